"""A service for a contract that nobody has implemented yet: answers that are given, or made up from the types."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import math
import random
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import msgspec
from msgspec import UNSET, Struct, to_builtins
from msgspec import inspect as kinds

from quintet.contract import Contract, Operation, Style
from quintet.errors import ConfigurationError, Declined
from quintet.server import Service

AnyOperation: TypeAlias = Operation[Any, Any, Any]
regex: Any = importlib.import_module("re._parser")  # the standard library has no public door to a pattern's parts
EPOCH = datetime(2026, 1, 1)  # made-up moments fall into the year after it


class Case(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One given answer. `when`: the parameters for which it holds (those that are not named may be anything).

    Of `answer`, `fault` ({"NoSuchPassenger": {"passenger_id": "p-9"}}) and `declined` (surveys) there is at most one;
    with none the answer is made up. `delay`: seconds until it is given.
    """

    when: Mapping[str, Any] = {}
    answer: Any = UNSET
    fault: Mapping[str, Mapping[str, Any]] = {}
    declined: bool = False
    delay: float = 0.0


Answers: TypeAlias = Mapping[str, Case | Sequence[Case]]
"""By the operation's name; of several cases the first that fits."""


def mock(contract: type[Contract], answers: Answers | None = None, *, seed: int = 0) -> Service:
    """A service that answers each operation of the contract, surveys included, as `answers` say or with made-up values.

    The same parameters and seed give the same answer. Raises ConfigurationError where a given answer does not fit, or
    none can be made up.
    """
    given = {name: list(cases) if isinstance(cases, Sequence) else [cases] for name, cases in (answers or {}).items()}
    operations = contract.__quintet__.operations
    if unknown := set(given) - set(operations):
        raise ConfigurationError(
            f"answers for {', '.join(sorted(unknown))}: {contract.__name__} has only {', '.join(operations)}"
        )
    service = Service(contract, answers="memory://")
    for operation in operations.values():
        if operation.style is not Style.EVENT:
            service.handles(operation)(_handler(operation, given.get(operation.name, []), seed))
    return service


def read_answers(path: str | Path) -> Answers:
    """Given answers from a TOML or JSON file: by operation one case or a list of cases. Raises ConfigurationError."""
    path = Path(path)
    try:
        text = path.read_text()
        read = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        kind = dict[str, Case | list[Case]]
        return msgspec.convert(read, kind)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}; a case has when, answer, fault, declined, delay") from None


def _handler(operation: AnyOperation, cases: Sequence[Case], seed: int) -> Callable[..., Any]:
    def make(record: Struct) -> Any:
        values = to_builtins(record, str_keys=True)
        asked = json.dumps([seed, operation.full_name, values], sort_keys=True)
        return made_up(operation.result, random.Random(asked), operation.name, values)  # noqa: S311 - no secret

    made_up(operation.result, random.Random(seed), operation.name)  # noqa: S311 - refuses at start-up what it cannot
    compiled = [(_wanted(operation, case), case.delay, _outcome(operation, case) or make) for case in cases]

    async def answer(*args: Any, **kwargs: Any) -> Any:
        record = operation.record(*args, **kwargs)
        for wanted, delay, outcome in compiled:
            if all(getattr(record, name) == value for name, value in wanted.items()):
                await asyncio.sleep(delay)
                return outcome(record)
        return make(record)

    parameters = list(inspect.signature(operation.function).parameters.values())[1:]
    answer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    answer.__name__ = answer.__qualname__ = f"mock_{operation.name}"
    return answer


def _wanted(operation: AnyOperation, case: Case) -> dict[str, Any]:
    types = {field.name: field.type for field in msgspec.structs.fields(operation.record)}
    if unknown := set(case.when) - set(types):
        raise ConfigurationError(f"{operation!r}: when names {', '.join(sorted(unknown))}, no parameter of it")
    return {name: _fitting(value, types[name], f"{operation!r}: when.{name}") for name, value in case.when.items()}


def _outcome(operation: AnyOperation, case: Case) -> Callable[[Struct], Any] | None:
    """What a case does with the parameters: returns its answer or raises; None where the answer is to be made up."""
    if (case.answer is not UNSET) + len(case.fault) + case.declined > 1:
        raise ConfigurationError(f"{operation!r}: a case has one of answer, fault and declined")
    if case.declined and operation.style is not Style.SURVEY:
        raise ConfigurationError(f"{operation!r} is a {operation.style.value}: only a survey can be declined")
    if case.answer is not UNSET:
        value = _fitting(case.answer, operation.result, f"{operation!r}: answer")
        return lambda _: value
    if not case.fault and not case.declined:
        return None
    fault = _fault(operation, case.fault) if case.fault else lambda: Declined("as its answers say")

    def refuse(_: Struct) -> Any:
        raise fault()

    return refuse


def _fault(operation: AnyOperation, given: Mapping[str, Mapping[str, Any]]) -> Callable[[], Exception]:
    ((name, fields),) = given.items()
    found = next((fault for fault in operation.faults if fault.__name__ == name), None)
    if found is None:
        known = ", ".join(fault.__name__ for fault in operation.faults) or "none"
        raise ConfigurationError(f"{operation!r} declares no fault {name!r}; it declares: {known}")
    record = _fitting(fields, found.record, f"{operation!r}: fault {name}")
    return lambda: found.from_record(record)


def _fitting(value: Any, type_: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, type_, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where} does not fit the contract: {error}") from None


# Values that are made up: by the type's kind, within its constraints


def made_up(type_: Any, chance: random.Random, name: str = "", known: Mapping[str, Any] | None = None) -> Any:
    """A value of the type. `name` flavours strings; a record's field of a name in `known` takes that value if it fits.

    A field with a default keeps it. Raises ConfigurationError for a type that no value can be made up for.
    """
    plain = _Maker(chance, known or {}).value(kinds.type_info(type_), name)
    try:
        return msgspec.convert(plain, type_, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        if known:
            return made_up(type_, chance, name)
        raise ConfigurationError(f"no value can be made up for {name or type_}: {error}; give answers for it") from None


class _Endless(ConfigurationError):
    """A record that always contains itself."""


class _Maker:
    """Makes values as JSON would carry them; what contains itself ends where it may be left out."""

    def __init__(self, chance: random.Random, known: Mapping[str, Any]) -> None:
        self._chance = chance
        self._known = known
        self._within: list[type] = []  # the records that are being made, from the outermost

    def value(self, kind: kinds.Type, name: str) -> Any:
        chance = self._chance
        match kind:
            case kinds.Metadata(type=inner):
                return self.value(inner, name)
            case kinds.NoneType():
                return None
            case kinds.BoolType():
                return chance.random() < 0.5
            case kinds.IntType():
                return self._integer(kind, name)
            case kinds.FloatType():
                low, high = _bounds(kind, 0.0, 100.0, 0.01)
                return round(chance.uniform(low, high), 2) if high - low > 1 else chance.uniform(low, high)
            case kinds.DecimalType():
                return f"{chance.randrange(10_000) / 100:.2f}"
            case kinds.StrType():
                return self._text(kind, name)
            case kinds.BytesType() | kinds.ByteArrayType() | kinds.MemoryViewType():
                most = 8 if kind.max_length is None else kind.max_length
                return b64encode(chance.randbytes(max(kind.min_length or 0, min(most, 8)))).decode()
            case kinds.DateTimeType(tz=tz):
                return self._moment().isoformat() + ("" if tz is False else "Z")
            case kinds.TimeType(tz=tz):
                return self._moment().time().isoformat() + ("Z" if tz else "")
            case kinds.DateType():
                return self._moment().date().isoformat()
            case kinds.TimeDeltaType():
                return chance.randrange(3600)
            case kinds.UUIDType():
                return str(UUID(int=chance.getrandbits(128), version=4))
            case kinds.EnumType(cls=cls):
                return chance.choice(list(cls)).value
            case kinds.LiteralType(values=values):
                return chance.choice(values)
            case kinds.UnionType(types=types):
                return self._union(types, name)
            case kinds.TupleType(item_types=items):
                return [self.value(item, name) for item in items]
            case kinds.ListType() | kinds.VarTupleType() | kinds.SetType() | kinds.FrozenSetType():
                return self._items(kind, lambda: self.value(kind.item_type, name))
            case kinds.DictType():
                pair = lambda: (self.value(kind.key_type, name), self.value(kind.value_type, name))  # noqa: E731
                return dict(self._items(kind, pair))
            case kinds.StructType() | kinds.DataclassType() | kinds.TypedDictType() | kinds.NamedTupleType():
                return self._record(kind)
            case kinds.AnyType() | kinds.RawType():
                return None
            case _:
                raise ConfigurationError(f"no value can be made up for {name}, a {kind}; give its answers")

    def _record(self, kind: Any) -> Any:
        if self._within.count(kind.cls) > 1:
            raise _Endless(f"no value can be made up for {kind.cls.__name__}: it always contains itself")
        self._within.append(kind.cls)
        known = self._known if len(self._within) == 1 else {}  # the reply's own "trip_id" is the one that was asked for
        try:
            tag: Any = getattr(kind, "tag", None)
            if isinstance(kind, kinds.NamedTupleType) or getattr(kind, "array_like", False):
                return [tag][: tag is not None] + [self.value(field.type, field.name) for field in kind.fields]
            values = {
                field.encode_name: known[field.name] if field.name in known else self.value(field.type, field.name)
                for field in kind.fields
                if field.required or field.name in known
            }
        finally:
            self._within.pop()
        return values | ({kind.tag_field: tag} if getattr(kind, "tag_field", None) else {})

    def _union(self, types: Sequence[kinds.Type], name: str) -> Any:
        """One of its types; None only where all others contain themselves."""
        others = [kind for kind in types if not isinstance(kind, kinds.NoneType)]
        for kind in self._chance.sample(others, len(others)):
            with contextlib.suppress(_Endless):
                return self.value(kind, name)
        if len(others) < len(types):
            return None
        raise _Endless(f"no value can be made up for {name}: it always contains itself")

    def _items(self, kind: Any, item: Callable[[], Any]) -> list[Any]:
        """One or two items, where the constraints allow; none where they would contain themselves."""
        least = kind.min_length or 0
        most = least + 2 if kind.max_length is None else min(kind.max_length, least + 2)
        try:
            return [item() for _ in range(self._chance.randint(min(max(least, 1), most), most))]
        except _Endless:
            if least:
                raise
            return []

    def _integer(self, kind: kinds.IntType, name: str) -> int:
        low, high = _bounds(kind, 0, 999, 1)
        step = kind.multiple_of or 1
        least, most = math.ceil(low / step), math.floor(high / step)
        if least > most:
            raise ConfigurationError(f"no number can be made up for {name}: its constraints leave none")
        return int(self._chance.randint(least, most) * step)

    def _text(self, kind: kinds.StrType, name: str) -> str:
        if kind.pattern is not None:
            return _matching(regex.parse(kind.pattern), self._chance, kind.pattern)
        text = f"{name or 'text'}-{self._chance.randint(1, 999)}"
        if kind.max_length is not None:
            text = text[max(0, len(text) - kind.max_length) :]
        return text.ljust(kind.min_length or 0, "x")

    def _moment(self) -> datetime:
        return EPOCH + timedelta(seconds=self._chance.randrange(365 * 24 * 3600))


def _bounds(kind: kinds.IntType | kinds.FloatType, low: float, high: float, step: float) -> tuple[float, float]:
    """From where to where a number may go: its constraints, and where they are open `low` and `high`."""
    span = high - low
    least = kind.ge if kind.ge is not None else None if kind.gt is None else kind.gt + step
    most = kind.le if kind.le is not None else None if kind.lt is None else kind.lt - step
    if least is None:
        least = low if most is None or most >= low else most - span
    if most is None:
        most = max(high, least + span)
    return least, most


def _matching(parsed: Iterable[Any], chance: random.Random, pattern: str) -> str:
    """A text that matches a parsed regular expression of the usual parts."""
    text = ""
    for operator, operand in parsed:
        match str(operator):
            case "LITERAL":
                text += chr(operand)
            case "ANY":
                text += "x"
            case "AT":
                pass
            case "IN":
                text += chance.choice(_members(operand, pattern))
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, inner = operand
                for _ in range(chance.randint(least, min(most, max(least, 3)))):
                    text += _matching(inner, chance, pattern)
            case "SUBPATTERN":
                text += _matching(operand[3], chance, pattern)
            case "BRANCH":
                text += _matching(chance.choice(operand[1]), chance, pattern)
            case _:
                raise ConfigurationError(f"no text can be made up for the pattern {pattern!r}; give answers for it")
    return text


_CATEGORIES = {"CATEGORY_DIGIT": "0123456789", "CATEGORY_WORD": "abcdefgh0123", "CATEGORY_SPACE": " "}


def _members(parts: Iterable[Any], pattern: str) -> str:
    """The characters of a class like [a-z_]."""
    found = ""
    for operator, operand in parts:
        match str(operator):
            case "LITERAL":
                found += chr(operand)
            case "RANGE":
                found += "".join(map(chr, range(operand[0], operand[1] + 1)))
            case "CATEGORY" if str(operand) in _CATEGORIES:
                found += _CATEGORIES[str(operand)]
            case _:
                raise ConfigurationError(f"no text can be made up for the pattern {pattern!r}; give answers for it")
    return found
