"""What a constructor accepts, read from its annotations.

A value of a config that the annotation of its parameter does not allow is refused before anything
is built from it: a string where a bool belongs is true, whatever it says, and NaN passes most
comparisons. An annotation may be narrowed, as in ``Annotated[int, at_least(1)]``; what is used more
than once has a name here.

Integers and floats of NumPy count as such, a bool is not a number, a float is no integer even if
it is whole, and numbers are finite. Any sequence but a string may stand for a list or a tuple, and
any mapping for a dict, so that configs of other kinds work.
"""

import ast
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

Kind = TypeVar('Kind', bound=type)


@dataclass(frozen=True)
class Rule:
    """Narrows an annotation.

    Attributes:
        text (str): Follows the description of the type: an integer ``of at least 1``.
        holds (Callable[[Any], bool]): Of a value of the type.
    """

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """A number that is not below another."""
    return Rule(f'of at least {low}', lambda x: x >= low)


def above(low: float) -> Rule:
    """A number above another."""
    return Rule(f'above {low}', lambda x: x > low)


def between(low: float, high: float) -> Rule:
    """A number in an open interval."""
    return Rule(f'between {low} and {high}', lambda x: low < x < high)


def within(low: float, high: float) -> Rule:
    """A number in a closed interval."""
    return Rule(f'within [{low}, {high}]', lambda x: low <= x <= high)


filled = Rule('that is not empty', lambda x: len(x) > 0)
typed = Rule('with `type`', lambda x: isinstance(x.get('type'), str) or callable(x.get('type')))
ascending = Rule('with the smaller one first', lambda x: x[0] <= x[1])

Positive = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, above(0)]
NaturalFloat = Annotated[float, at_least(0)]
Share = Annotated[float, within(0, 1)]
Interval = Annotated[tuple[PositiveFloat, PositiveFloat], ascending]
Size = Positive | tuple[Positive, Positive]
Name = Annotated[str, filled]
# The config of something that a registry builds.
ModuleCfg = Annotated[dict, typed]
InitCfg = ModuleCfg | Annotated[Sequence[ModuleCfg], filled] | None


def checked(kind: Kind | None = None, /, **inherited: Any) -> Any:
    """Let the constructor of a class refuse what its annotations do not allow.

    Put it below ``register_module``. Parameters that go on to a base class by ``**kwargs`` are
    those of its annotations, too; one without an annotation is a bool if its default is, and else
    free.

    Args:
        kind (type): The class, changed in place.
        **inherited: Annotations of parameters of base classes, in place of theirs.

    Returns:
        type: The same class.
    """
    if kind is None:
        return functools.partial(checked, **inherited)
    initialize = kind.__init__  # type: ignore[misc]
    own = inspect.signature(initialize)

    @functools.cache
    def expected() -> dict[str, tuple[Any, Any]]:
        return {
            name: (inherited.get(name, annotation), default)
            for name, (annotation, default) in parameters(kind).items()
        }

    @functools.wraps(initialize)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = dict(own.bind_partial(self, *args, **kwargs).arguments)
        except TypeError:
            given = {}  # Python's own error, below, names the argument
        for name, parameter in own.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                further = [name for name in expected() if name not in own.parameters]
                given.update(zip(further, given.pop(name, ()), strict=False))
        for name, value in given.items():
            if name in expected():
                check(type(self).__name__, name, value, *expected()[name])
        initialize(self, *map(_plain, args), **{key: _plain(x) for key, x in kwargs.items()})

    kind.__init__ = checking  # type: ignore[misc]
    return kind


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, which is all that some base classes know."""
    return value.item() if isinstance(value, np.generic) else value


def parameters(kind: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each named parameter of a class, through ``**kwargs`` to its bases.

    Args:
        kind (type): A class.

    Returns:
        dict[str, tuple]: ``Any``, or ``Parameter.empty`` as the default, where there is none.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for initialize in constructors(kind):
        hints = get_type_hints(initialize, include_extras=True)
        for parameter in list(inspect.signature(initialize).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            fallback = bool if isinstance(parameter.default, bool) else Any
            hint = hints.get(parameter.name, fallback)
            found.setdefault(parameter.name, (hint, parameter.default))
    return found


def constructors(kind: type) -> Iterator[Callable]:
    """What the arguments of a class may reach: its constructor, and by ``**kwargs`` those of bases.

    Args:
        kind (type): A class.

    Yields:
        Callable: Each ``__init__``, but for that of ``object``.
    """
    for base in kind.__mro__[:-1]:
        if '__init__' in vars(base):
            initialize = inspect.unwrap(vars(base)['__init__'])
            yield initialize
            if not takes_more(initialize):
                return


def takes_more(function: Callable) -> bool:
    """Whether a function has ``**kwargs``.

    Args:
        function (Callable): A function.
    """
    return any(x.kind is x.VAR_KEYWORD for x in inspect.signature(function).parameters.values())


def check(
    owner: str, name: str, value: Any, annotation: Any, default: Any = inspect.Parameter.empty
) -> None:
    """Refuse a value that an annotation does not allow.

    Args:
        owner (str): Whose argument it is, for the message.
        name (str): Name of the argument.
        value (Any): The value.
        annotation (Any): What is allowed.
        default (Any): Always allowed, and named as a remedy. Defaults to none.

    Raises:
        ValueError: One sentence with the name, the value, what is allowed and a remedy.
    """
    if value is default or fits(value, annotation):
        return
    remedy = 'change it'
    if default is not inspect.Parameter.empty and default is not None:
        remedy = f'leave it out for {default!r}'
    meant = _meant(value)
    if meant is not None and fits(meant, annotation):
        remedy = f'write {meant!r}'
    raise ValueError(f'{owner}: {name}={_short(value)} must be {describe(annotation)}; {remedy}.')


def fits(value: Any, annotation: Any) -> bool:
    """Whether an annotation allows a value.

    Args:
        value (Any): The value.
        annotation (Any): A class, a union, a generic list, tuple or dict, a ``Literal``, or one of
            these with a :class:`Rule`.

    Returns:
        bool: True also for annotations of other kinds.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(value, inner[0]) and all(rule.holds(value) for rule in inner[1:])
    if origin in (Union, types.UnionType):
        return any(fits(value, x) for x in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if annotation is Any:
        return True
    if annotation in (None, type(None)):
        return value is None
    if annotation is bool:
        return isinstance(value, (bool, np.bool_))
    if annotation is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    kind = origin or annotation
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) or hasattr(value, 'to_dict')
    if kind in (list, tuple, Sequence):
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            return False
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(x, inner[0]) for x in value)
    return not isinstance(kind, type) or isinstance(value, kind)


def describe(annotation: Any) -> str:
    """What an annotation allows, in words: 'an integer of at least 1 or None'."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ' '.join([describe(inner[0]), *(rule.text for rule in inner[1:])])
    if origin in (Union, types.UnionType):
        return ' or '.join(dict.fromkeys(describe(x) for x in inner))
    if origin is Literal:
        return ' or '.join(map(repr, inner))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f'{len(inner)} values ({describe(inner[0])} each)'
    if origin in (list, tuple, Sequence) and inner:
        return f'a list ({describe(inner[0])} each)'
    if annotation in (None, type(None)):
        return 'None'
    kind = origin or annotation
    return _NAMES.get(kind) or f'a {getattr(kind, "__name__", kind)}'


_NAMES = {
    bool: 'True or False',
    int: 'an integer',
    float: 'a finite number',
    str: 'a string',
    dict: 'a dict',
    Mapping: 'a dict',
    list: 'a list',
    tuple: 'a list',
    Sequence: 'a list',
}


def _meant(value: Any) -> Any:
    """What was probably meant: '3' is 3, 'false' is False, 2.0 is 2; None if nothing."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ('true', 'false'):
            return text.lower() == 'true'
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def _short(value: Any) -> str:
    """A value on one line of bounded length."""
    text = ' '.join(repr(value).split())
    return text if len(text) <= 80 else f'{text[:77]}...'
