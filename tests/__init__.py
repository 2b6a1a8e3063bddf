"""The run-time type checker of the suite: beartype, where an int will do for a float (PEP 484)."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True))
