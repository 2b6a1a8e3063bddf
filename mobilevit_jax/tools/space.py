"""What a sweep searches: overrides of a config, drawn by an Optuna trial.

A space is a function trial -> {dotted key of the config: value}. A recipe's `sweep(trial)` is one;
`parse` makes one of texts such as "log:1e-4:1e-2". Before a sweep begins, `corners` calls it with
made-up trials, so that what a trial could trip over is found at once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from mobilevit_jax import build

Space = Callable[[optuna.trial.BaseTrial], Mapping[str, Any]]
USAGE = "uniform:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH or choice:A,B,…"
# Commas that separate choices: none inside brackets or quotes.
CHOICE = re.compile(r"""(?:\([^)]*\)|\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")


def parse(texts: Mapping[str, str]) -> Space:
    """The space of --space.KEY=TEXT.

    Args:
        texts: by key of the config, one of USAGE; choices stay text, to be read as on the command
            line.

    Raises:
        ConfigError: a text that is none of these, or an empty range.
    """
    distributions = {key: _distribution(key, text) for key, text in texts.items()}

    def draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {key: _suggest(trial, key, each) for key, each in distributions.items()}

    return draw


def _distribution(key: str, text: str) -> BaseDistribution:
    kind, _, rest = text.partition(":")
    try:
        if kind == "choice":
            choices = [choice.strip() for choice in CHOICE.findall(rest)]
            if len(choices) > len(set(choices)):
                raise ValueError("a choice is given twice")
            return CategoricalDistribution(choices)
        if kind not in ("int", "uniform", "log"):
            raise ValueError(f"{kind!r} is unknown")
        low, colon, high = rest.partition(":")
        if not colon:
            raise ValueError("there is no HIGH")
        if kind == "int":
            return IntDistribution(int(low), int(high))
        return FloatDistribution(float(low), float(high), log=kind == "log")
    except ValueError as error:
        detail = str(error).splitlines()[0].rstrip(".")
        raise build.ConfigError(f"--space.{key}={text}: {detail}; write {USAGE}") from error


def _suggest(trial: optuna.trial.BaseTrial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_float(key, low, high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high)
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(key, distribution.choices)


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as they are written on the command line."""
    return [
        f"--config.{key}={value if isinstance(value, str) else repr(value)}"
        for key, value in overrides.items()
    ]


class _Corner(optuna.samplers.BaseSampler):
    """Draws the lowest value of everything, or the highest; of choices the one at `index`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if isinstance(param_distribution, CategoricalDistribution):
            choices = param_distribution.choices
            return choices[min(self._index, len(choices) - 1)]
        assert isinstance(param_distribution, FloatDistribution | IntDistribution)
        return param_distribution.high if self._index else param_distribution.low


Corner = tuple[dict[str, Any], dict[str, BaseDistribution]]


def corners(space: Space) -> list[Corner]:
    """Overrides, and what they were drawn from: all lowest, all highest, and every choice once.

    Raises:
        ConfigError: the space draws nothing, gives no dict, or raises.
    """
    found: list[Corner] = []
    rounds, index = 2, 0
    while index < rounds:
        trial = optuna.create_study(sampler=_Corner(index)).ask()
        overrides = draw(space, trial)
        if not trial.distributions:
            raise build.ConfigError(
                "the space is empty: sweep(trial) draws nothing; give --space.KEY=, such as "
                "--space.optimizer.lr=log:1e-4:1e-2"
            )
        choices = (
            each
            for each in trial.distributions.values()
            if isinstance(each, CategoricalDistribution)
        )
        rounds = max([rounds, *(len(each.choices) for each in choices)])
        found.append((overrides, dict(trial.distributions)))
        index += 1
    return found


def draw(space: Space, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Calls a space, which may be a recipe's code.

    Raises:
        ConfigError: it raises, or gives something else than a dict.
    """
    try:
        overrides = space(trial)
    except optuna.exceptions.StorageInternalError:
        raise
    except Exception as error:  # a recipe is code, and may raise anything
        raise build.ConfigError(f"sweep(trial) fails: {type(error).__name__}: {error}") from error
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise build.ConfigError(
            f"sweep(trial) gives {overrides!r}; it must give a dict of the config's keys, such as "
            '{"optimizer.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}'
        )
    return dict(overrides)


def grid(drawn: Sequence[Corner]) -> list[dict[str, Any]]:
    """Every combination of choices and whole numbers.

    Args:
        drawn: what `corners` gives.

    Raises:
        ConfigError: there is a range without steps, or what is drawn depends on what was drawn.
    """
    distributions = drawn[0][1]
    if any(each != distributions for _, each in drawn):
        raise build.ConfigError(
            "--sampler=grid needs a space that draws the same in every trial; use tpe or random"
        )
    points: list[dict[str, Any]] = [{}]
    for name, distribution in distributions.items():
        values = list(_values(name, distribution))
        points = [{**point, name: value} for point in points for value in values]
    return points


def _values(name: str, distribution: BaseDistribution) -> Iterator[Any]:
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        yield from range(distribution.low, distribution.high + 1, distribution.step)
    elif isinstance(distribution, FloatDistribution) and distribution.step:
        steps = round((distribution.high - distribution.low) / distribution.step)
        yield from (distribution.low + i * distribution.step for i in range(steps + 1))
    else:
        raise build.ConfigError(
            f"--sampler=grid has no grid of {name}, a range without steps; write its points: "
            f"--space.{name}=choice:A,B,…"
        )
