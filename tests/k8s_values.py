"""What single values of a manifest may be: names, labels, quantities, ports, probes' numbers. Functions yield sentences: path, value, rule.

The rules are the API server's; what it accepts is not named here. `None` is an absent field, as it is to the server.
"""

from __future__ import annotations

import ipaddress
import re
import zoneinfo
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

Errors = Iterator[str]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LETTER_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]+")
QUANTITY = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
UNITS = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "": "1", **{unit: f"1e{3 * (i + 1)}" for i, unit in enumerate("kMGTPE")}}
BINARY = {f"{unit}i": 2 ** (10 * (i + 1)) for i, unit in enumerate("KMGTPE")}
INT32 = 2**31 - 1
ANNOTATIONS_BYTES = 256 * 1024


def amount(value: Any) -> Decimal | None:
    """A quantity as a number (`500m` -> 0.5, `2Gi` -> bytes); None for what the server cannot read as one."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    found = QUANTITY.fullmatch(str(value))
    if found is None:
        return None
    number, unit = Decimal(found[1]), found[2] or ""
    if unit in BINARY:
        return number * BINARY[unit]
    return number * Decimal(UNITS.get(unit, f"1{unit}"))


def quantity(at: str, value: Any, *, positive: bool = False) -> Errors:
    found = amount(value)
    if found is None:
        yield f"{at}: {value!r} is no quantity; write a number with a unit such as m, Mi, Gi, M, G"
    elif found < 0 or (positive and found == 0):
        yield f"{at}: {value!r} must be {'greater than' if positive else 'at least'} 0"


def among(at: str, value: Any, *known: str) -> Errors:
    """A value of an enum; absent is fine."""
    if value is not None and value not in known:
        yield f"{at}: {value!r} is not supported; use {', '.join(known)}"


def at_least(at: str, value: Any, least: int = 0) -> Errors:
    if isinstance(value, int) and value < least:
        yield f"{at}: {value} must be at least {least}"


def named(at: str, value: Any, pattern: re.Pattern[str] = SUBDOMAIN, limit: int = 253) -> Errors:
    """A name that must be there."""
    if not isinstance(value, str) or len(value) > limit or not pattern.fullmatch(value):
        words = {LABEL: "a-z, 0-9 and -", LETTER_LABEL: "a-z, 0-9 and -, a letter first", SUBDOMAIN: "a-z, 0-9, - and ."}
        yield f"{at}: {value!r} is no name of at most {limit} characters of {words[pattern]}, with a letter or digit at both ends"


def qualified(at: str, key: Any) -> Errors:
    """A key of labels, annotations, taints, resources: [prefix/]name."""
    prefix, slash, name = str(key).rpartition("/")
    if slash and (len(prefix) > 253 or not SUBDOMAIN.fullmatch(prefix)):
        yield f"{at}: the prefix of {key!r} is no DNS name of at most 253 characters"
    if len(name) > 63 or not QUALIFIED.fullmatch(name):
        yield f"{at}: {key!r} is no key; its name has 1 to 63 characters of A-Z, a-z, 0-9, -, _ and ., with a letter or digit at both ends"


def label_value(at: str, value: Any) -> Errors:
    if value and (len(str(value)) > 63 or not QUALIFIED.fullmatch(str(value))):
        yield f"{at}: {value!r} is no label's value; at most 63 characters of A-Z, a-z, 0-9, -, _ and ., with a letter or digit at both ends"


def labels(at: str, found: dict[str, Any] | None) -> Errors:
    for key, value in (found or {}).items():
        yield from qualified(at, key)
        yield from label_value(f"{at}.{key}", value)


def metadata(at: str, found: dict[str, Any]) -> Errors:
    """Labels and annotations of an object or a pod template."""
    yield from labels(f"{at}.labels", found.get("labels"))
    annotations = found.get("annotations") or {}
    for key in annotations:
        yield from qualified(f"{at}.annotations", str(key).lower())
    if sum(len(str(key).encode()) + len(str(value).encode()) for key, value in annotations.items()) > ANNOTATIONS_BYTES:
        yield f"{at}.annotations: more than {ANNOTATIONS_BYTES} bytes together; put large texts into a ConfigMap"


def selector(at: str, found: dict[str, Any] | None, *, node: bool = False) -> Errors:
    """A label selector, or a term of a node selector, which has two operators more."""
    found = found or {}
    yield from labels(f"{at}.matchLabels", found.get("matchLabels"))
    for i, expression in enumerate(found.get("matchExpressions") or []):
        here, operator, values = f"{at}.matchExpressions[{i}]", expression.get("operator"), expression.get("values") or []
        yield from qualified(f"{here}.key", expression.get("key"))
        yield from among(f"{here}.operator", operator or "", "In", "NotIn", "Exists", "DoesNotExist", *(("Gt", "Lt") if node else ()))
        if operator in ("In", "NotIn") and not values:
            yield f"{here}.values: {operator} needs values"
        if operator in ("Exists", "DoesNotExist") and values:
            yield f"{here}.values: {operator} takes no values"
        if operator in ("Gt", "Lt") and (len(values) != 1 or not re.fullmatch(r"[+-]?\d+", str(values[0]))):
            yield f"{here}.values: {operator} takes one whole number"
        for value in values if not node else ():
            yield from label_value(f"{here}.values", value)


def port(at: str, value: Any, *, name: bool = False) -> Errors:
    """A port's number, or its name where that is allowed."""
    if isinstance(value, str) and name:
        yield from port_name(at, value)
    elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        yield f"{at}: {value!r} is no port; use 1 to 65535" + (" or a port's name" if name else "")


def port_name(at: str, value: Any) -> Errors:
    if len(str(value)) > 15 or not LABEL.fullmatch(str(value)) or "--" in str(value) or not re.search("[a-z]", str(value)):
        yield f"{at}: {value!r} is no port's name; 1 to 15 characters of a-z, 0-9 and single -, with a letter"


def network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """A CIDR, or None; the address may lie within the network."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F:.]+/(0|[1-9][0-9]*)", value):
        return None
    try:
        return ipaddress.ip_network(value, strict=False)
    except ValueError:
        return None


def address(value: Any) -> bool:
    """Whether a text is one IP address."""
    return isinstance(value, str) and "/" not in value and network(f"{value}/{128 if ':' in value else 32}") is not None


def time_zone(at: str, value: Any) -> Errors:
    known = zoneinfo.available_timezones()  # empty where the machine has no database of them
    if value is not None and known and value not in known:
        yield f"{at}: {value!r} is no time zone such as Etc/UTC"


def unique(at: str, values: list[Any], what: str) -> Errors:
    found = [value for value in values if value is not None]
    for value in sorted({str(value) for value in found if found.count(value) > 1}):
        yield f"{at}: {what} {value!r} is there twice"


def count_or_percent(at: str, value: Any, *, over: bool = False) -> Errors:
    """A whole number, or a percentage of at most 100 unless `over`."""
    if isinstance(value, str):
        if not re.fullmatch(r"[0-9]+%", value):
            yield f"{at}: {value!r} is neither a whole number nor a percentage such as 50%"
        elif not over and int(value[:-1]) > 100:
            yield f"{at}: {value!r} is more than 100%"
    else:
        yield from at_least(at, value)


def cron(at: str, text: Any) -> Errors:
    """A schedule of five fields, or a word such as @daily."""
    fields, limits = str(text).split(), [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]
    words = "jan feb mar apr may jun jul aug sep oct nov dec sun mon tue wed thu fri sat".split()
    if "TZ" in str(text):
        yield f"{at}: {text!r} names a time zone; use the field timeZone"
    elif re.fullmatch(r"@(yearly|annually|monthly|weekly|daily|midnight|hourly|every \S+)", str(text)):
        return
    elif len(fields) != 5:
        yield f"{at}: {text!r} has {len(fields)} fields, not minute, hour, day, month and weekday"
    for value, (low, high) in zip(fields, limits, strict=False) if len(fields) == 5 else ():
        for part in value.split(","):
            found = re.fullmatch(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\d+))?", part)
            numbers = [n for n in (found[1], found[2]) if n and n not in "*?"] if found else [""]
            if any(n.lower() not in words and not (n.isdigit() and low <= int(n) <= high) for n in numbers) or (found and found[3] == "0"):
                yield f"{at}: {value!r} of {text!r} is not within {low} to {high}"
                break
