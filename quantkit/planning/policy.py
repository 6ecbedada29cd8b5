"""Rules that a plan must keep, as data a person can read.

A policy turns the model's tensors into groups with allowed formats: tensors that must share a format,
floors for roles, formats kept by request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.roles import ATTENTION_ROLES, SHARED_ROLES, Role
from quantkit.errors import PlanError
from quantkit.formats import Format, formats, get_format
from quantkit.planning.plan import Pins

# Lowest format a role may get. Super weights are handled by their tensors.
FLOORS: dict[Role, str] = {
    **dict.fromkeys(ATTENTION_ROLES, "Q2_K"),
    **dict.fromkeys(SHARED_ROLES, "Q2_K"),
    Role.EMBEDDING: "Q2_K",
    Role.HEAD: "Q3_K",
}
SUPER_WEIGHT_FLOOR = "Q4_K"  # their blocks are fitted so that they survive (encoders/pins.py)
FLOOR_GROUPS: dict[str, frozenset[Role]] = {  # what --floor may name besides single roles
    "attention": ATTENTION_ROLES,
    "shared": SHARED_ROLES,
    "experts": frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN}),
    "ffn": frozenset({Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN}),
}
NO_FLOOR = "none"
NEVER_QUANTIZED = (Role.ROUTER, Role.NORM)
ROUTER_RULE = "router is F32: llama.cpp never quantizes it"


def parse_floors(texts: Sequence[str]) -> dict[Role, str]:
    """Floors from ``--floor ROLE=FORMAT``, on top of FLOORS: the last option that names a role wins.

    ``ROLE=none`` takes a role's floor away, ``none`` alone takes all of FLOORS away, wherever it stands.
    Raises PlanError for what is not such an option, FormatError for an unknown format.
    """
    floors = {} if any(_word(text) == NO_FLOOR for text in texts) else dict(FLOORS)
    for text in texts:
        if _word(text) == NO_FLOOR:
            continue
        name, sign, asked = (part.strip() for part in text.partition("="))
        if not sign or not name or not asked:
            raise PlanError(f"--floor {text!r} is not ROLE=FORMAT", hint="for example --floor attention=Q4_K, or --floor none")
        for role in _floor_roles(name.lower(), asked):
            if _word(asked) == NO_FLOOR:
                floors.pop(role, None)
            else:
                floors[role] = get_format(asked).name
    return floors


def _word(text: str) -> str:
    return text.strip().lower()


def _floor_roles(name: str, asked: str) -> frozenset[Role]:
    """Roles that ``--floor NAME=…`` means; none for the router's F32, which is a fact."""
    if name in FLOOR_GROUPS:
        return FLOOR_GROUPS[name]
    roles = {role.value: role for role in Role}
    if name == Role.ROUTER.value and _word(asked) == "f32":
        return frozenset()
    if name in roles and roles[name] in NEVER_QUANTIZED:
        raise PlanError(
            f"--floor {name}={asked} changes nothing: llama.cpp never quantizes the {name}, it stays F32", hint="leave it out"
        )
    if name not in roles:
        known = ", ".join([*FLOOR_GROUPS, *(role.value for role in Role if role not in NEVER_QUANTIZED)])
        raise PlanError(f"--floor: unknown role {name!r}", hint=f"one of {known}")
    return frozenset({roles[name]})


@dataclass(frozen=True)
class Keep:
    """``--keep 'regex=FORMAT'``: tensors whose name matches get exactly this format."""

    pattern: str
    format: type[Format]

    @staticmethod
    def parse(text: str) -> Keep:
        """Parse ``regex=FORMAT``. Raises PlanError if it is not one."""
        pattern, sign, name = text.rpartition("=")
        if not sign or not pattern:
            raise PlanError(f"--keep {text!r} is not regex=FORMAT", hint="for example --keep 'attn_v=Q8_0'")
        try:
            re.compile(pattern)
        except re.error as error:
            raise PlanError(f"--keep {text!r}: {error}", hint="give a regular expression") from None
        return Keep(pattern, get_format(name))


@dataclass
class Policy:
    """The rules of one plan. ``floors`` maps a role to the lowest format it may get."""

    keeps: list[Keep] = field(default_factory=list)
    floors: dict[Role, str] = field(default_factory=lambda: dict(FLOORS))
    super_weights: Mapping[str, Pins] = field(default_factory=dict)  # by tensor; they survive exactly
    tied_heads: frozenset[str] = frozenset()  # an embedding that is the head too keeps the head's floor
    patterns: tuple[str, ...] = ()  # names of formats that may be used (shell patterns); empty: all
    fused: bool = False  # the target runtime fuses q/k/v and gate/up: they share a format

    def describe(self) -> list[str]:
        """The rules in words."""
        out = [*self._describe_floors(), ROUTER_RULE]
        if self.tied_heads and Role.HEAD in self.floors:
            out.append(f"the embedding is the head too: at least {self.floors[Role.HEAD]}")
        out += [
            f"{name} at least {SUPER_WEIGHT_FLOOR}: holds {'a super weight' if len(pins) == 1 else f'{len(pins)} super weights'}, kept as exactly as blocks allow"
            for name, pins in sorted(self.super_weights.items())
        ]
        if self.patterns:
            out.append(f"only formats like {', '.join(self.patterns)} and the unquantized ones")
        out += [f"names matching {keep.pattern!r} are {keep.format.name}" for keep in self.keeps]
        if self.fused:
            out.append("q, k and v share a format, gate and up share a format: the runtime fuses them")
        return out

    def _describe_floors(self) -> list[str]:
        """One line for each role with a floor, or for a whole group that shares one."""
        out: list[str] = []
        told: set[Role] = set()
        for group, roles in FLOOR_GROUPS.items():
            names = {self.floors.get(role) for role in roles}
            if len(names) == 1 and None not in names:
                out.append(f"{group} at least {names.pop()}")
                told |= roles
        out += [f"{role.value} at least {name}" for role, name in self.floors.items() if role not in told]
        return out

    def kept(self, info: TensorInfo) -> type[Format] | None:
        """The format asked for by --keep (first match wins), else None."""
        return next((keep.format for keep in self.keeps if re.search(keep.pattern, info.name)), None)

    def allowed(self, info: TensorInfo, offered: list[type[Format]]) -> list[type[Format]]:
        """Formats of ``offered`` that the rules allow for a tensor; never empty."""
        asked = self.kept(info)
        if asked is not None:
            return [asked]
        roles = [info.role, Role.HEAD] if info.name in self.tied_heads else [info.role]
        least = max((get_format(self.floors[role]).bpw() for role in roles if role in self.floors), default=0.0)
        if info.name in self.super_weights:
            least = max(least, get_format(SUPER_WEIGHT_FLOOR).bpw())
        if self.patterns:
            offered = [fmt for fmt in offered if not fmt.is_quantized() or self._named(fmt)]
        found = [fmt for fmt in offered if fmt.bpw() >= least]
        return found or [max(offered, key=lambda fmt: fmt.bpw())]

    def _named(self, fmt: type[Format]) -> bool:
        return any(fnmatch(fmt.name, pattern.upper()) for pattern in self.patterns)

    def groups(self, checkpoint: Checkpoint) -> list[list[TensorInfo]]:
        """Quantizable tensors, those that must share a format together."""
        by_key: dict[object, list[TensorInfo]] = {}
        for info in checkpoint.tensors.values():
            if info.quantizable:
                by_key.setdefault(self._key(info), []).append(info)
        return list(by_key.values())

    def _key(self, info: TensorInfo) -> object:
        if self.fused:
            for roles in (
                {Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V},
                {Role.FFN_GATE, Role.FFN_UP},
                {Role.EXPERT_GATE, Role.EXPERT_UP},
            ):
                if info.role in roles:
                    return (info.layer, tuple(sorted(r.value for r in roles)))
        return info.name

    def check_used(self, checkpoint: Checkpoint) -> None:
        """Raise PlanError if a --keep matches no tensor that can be quantized, its rows do not fit, or --formats no format."""
        for pattern in self.patterns:
            if not any(fnmatch(fmt.name, pattern.upper()) for fmt in formats()):
                raise PlanError(f"--formats {pattern!r} matches no format", hint="`quantkit formats` lists the names")
        for keep in self.keeps:
            matched = [t for t in checkpoint.tensors.values() if t.quantizable and re.search(keep.pattern, t.name)]
            if not matched:
                raise PlanError(f"--keep {keep.pattern!r} matches no tensor", hint="`quantkit inspect MODEL` lists the names")
            for info in matched:
                if self.kept(info) is keep.format and not keep.format.fits(info.columns):
                    raise PlanError(f"--keep: rows of {info.name} ({info.columns}) do not fit {keep.format.name}")
