"""Addresses of object storage (`s3://bucket/prefix/run?region=...`) as text: which are taken, how they are shown, where their local copy lies.

Nothing here reaches a network; `orchestrator.storage.buckets` does.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
"""What pyarrow.fs opens."""
_SHOWN = {
    "region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open", "tls_ca_file_path",
    "retry_limit_seconds", "enable_tls", "blob_storage_authority", "dfs_storage_authority", "replication", "user",
}  # fmt: skip
"""Query parameters that hold no secret; the value of every other one is masked."""
_SECRET = re.compile(r"secret|password|passwd|token|signature|credential|access_?key|account_?key|\bsas", re.IGNORECASE)


def is_address(text: str) -> bool:
    """Whether a text is meant as an address and not as a folder."""
    return "://" in text


def masked(text: str) -> str:
    """An address as it may be shown: no user, no password, no value of a query parameter that could be a secret."""
    text = re.sub(r"://[^/@?]*:[^/@?]*@", "://***@", text)
    base, mark, query = text.partition("?")
    pairs = [part.partition("=") for part in query.split("&")] if mark else []
    return base + mark + "&".join(name + equals + (value if name in _SHOWN else "***" if value else "") for name, equals, value in pairs)


def checked(text: str) -> str:
    """The address without a trailing slash. Raises ValueError (rule and remedy) for one that cannot be an output folder."""
    scheme = text.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"the scheme {scheme}:// is unknown; give one of {', '.join(f'{s}://' for s in SCHEMES)}, or a folder")
    parts = urlsplit(text)
    keys = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if parts.password is not None or (scheme == "s3" and "@" in parts.netloc) or any(_SECRET.search(key) for key in keys):
        raise ValueError("an address holds no credentials, because it is logged; export them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3)")
    if parts.fragment:
        raise ValueError("an address has no #fragment; leave it out")
    if scheme == "file" and parts.netloc:
        raise ValueError("a file address has three slashes (file:///shared/run)")
    if not parts.path.strip("/"):
        raise ValueError(f"name a folder below the bucket, e.g. {scheme}://{parts.netloc or 'bucket'}/results/{{name}}")
    base, mark, query = text.partition("?")
    return base.rstrip("/") + mark + query


def joined(address: str, *names: str) -> str:
    """The address of something below."""
    base, mark, query = address.partition("?")
    return "/".join([base.rstrip("/"), *(quote(name) for name in names)]) + mark + query


