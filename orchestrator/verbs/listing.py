"""Tables of what there is to choose from: `safebasin list ...`."""

from __future__ import annotations

from orchestrator.terminal import screen
from orchestrator.terminal.screen import Grid


def show(kind: str) -> None:
    """Print one of recipes, strategies, suites, attacks, judges, presets."""
    screen.show(screen.console(), _made(kind))


def rows(kind: str) -> list[dict[str, str]]:
    """The same, a mapping of column to text for each row."""
    return screen.texts_of(_made(kind))


def _made(kind: str) -> Grid:
    return {"recipes": _recipes, "strategies": _strategies, "suites": _suites, "attacks": _attacks, "judges": _judges, "presets": _presets}[kind]()


def _table(*columns: str) -> Grid:
    table = Grid(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):  # what is typed is never broken
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table


def _strategies() -> Grid:
    import strategies
    from strategies import cards

    table = _table("strategy", "stage", "idea", "needs", "ZeRO")
    for name in strategies.STRATEGIES:
        card, cls = cards.card(name), strategies.get(name)
        stage, idea = card["Stage"].split("(")[0].split(",")[0].strip(" ."), card["Idea"].split(". ")[0].split(": ")[0].rstrip(".")
        table.add_row(name, stage, idea, ", ".join(sorted(cls.needs)) or "-", f"0-{cls.max_zero_stage}")
    return table


def _recipes() -> Grid:
    from orchestrator import config
    from orchestrator.config import text

    table = _table("preset", "recipe")
    for name in text.presets():
        for recipe in config.load(name).recipe_names:
            table.add_row(name, recipe)
    return table


def _suites() -> Grid:
    from pathlib import Path

    from orchestrator.config import catalogue
    from orchestrator.evaluation import suites

    table = _table("suite (data:)", "kind", "prompts", "licence", "available", "description")
    for suite in suites.known_suites():
        table.add_row(suite.name, suite.kind, str(suite.prompts), suite.licence, "built in", suite.description)
    places = catalogue.folders(Path.cwd())
    for entry in catalogue.ENTRIES:
        local = catalogue.find_local(entry, places)
        known = local is not None or catalogue.in_hub_cache(entry)
        state = "offline" if known else "hub, account" if entry.gated else "hub"
        place = str(local) if local else f"hub cache of {entry.hub}" if known else entry.hub
        table.add_row(entry.name, entry.kind, str(entry.rows), entry.licence, state, f"{entry.about}; {entry.source}\n{place}")
    for name, members in catalogue.SETS.items():
        table.add_row(name, "set", "", "", "", "stands for " + ", ".join(members))
    table.add_row("safebench", "alias", "", "", "", f"no such benchmark for text is published; stands for {catalogue.ALIASES['safebench']}")
    return table


def _attacks() -> Grid:
    from orchestrator.evaluation import attacks

    table = _table("attack", "what it does")
    for name, attack in attacks.ATTACKS.items():
        table.add_row(name, " ".join((attack.__doc__ or "").split()))
    table.add_row("prefill_<k>", " ".join((attacks.prefill_at.__doc__ or "").split()))
    return table


def _judges() -> Grid:
    from orchestrator.evaluation.judges import registry

    table = _table("judge", "what it does")
    for name, cls in registry.JUDGES.items():
        table.add_row(name, " ".join((cls.__doc__ or "").split("\n\n")[0].split()))
    return table


def _presets() -> Grid:
    from orchestrator import config
    from orchestrator.config import text

    table = _table("preset", "recipes", "trials", "file")
    for name, path in text.presets().items():
        loaded = config.load(name)
        table.add_row(name, str(len(loaded.recipes)), str(loaded.search.trials), str(path))
    return table
