"""Licences of a model card: the identifiers of the Hugging Face Hub."""

import difflib
from typing import Any

from difftori.errors import ConfigError

KNOWN = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-openrail-m bsd bsd-2-clause bsd-3-clause "
    "bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 "
    "creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 "
    "mit mpl-2.0 ms-pl ncsa odbl odc-by openrail osl-3.0 pddl postgresql unknown unlicense wtfpl zlib"
).split()
_NEAR = 0.8


def checked_license(name: str | None, option: str) -> str | None:
    """Return a licence's identifier as the Hub writes it; another licence, or None, is returned as it is.

    Raises ConfigError for a name that is almost an identifier, such as `apache2.0`.
    """
    if name is None:
        return None
    lower = name.strip().lower()
    if lower in KNOWN:
        return lower
    near = difflib.get_close_matches(lower, KNOWN, n=1, cutoff=_NEAR)
    if near:
        raise ConfigError(
            [f"{option}: {name!r} is not an identifier of the Hub. Fix: write {near[0]}, or another name"]
        )
    if not name.strip() or not name.isprintable():
        raise ConfigError([f"{option}: {name!r} is not a name. Fix: write an identifier, such as mit"])
    return name.strip()


def header_of(name: str | None) -> dict[str, Any]:
    """Return the entries of a licence in the header of a card; none if no licence was given."""
    if name is None:
        return {}
    return {"license": name} if name in KNOWN else {"license": "other", "license_name": name}
