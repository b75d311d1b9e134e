"""Options of the command line, from settings that are declared once (see `mhesa.settings`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any, TypeVar

import typer

from mhesa.settings import setting_of

Command = TypeVar("Command", bound=Callable[..., Any])


def option(settings: type, field: str, *, name: str = "", default: Any = MISSING) -> inspect.Parameter:
    """The option for a field of a settings class; name and default are the field's if not given."""
    setting = setting_of(settings, field)
    name, doc = name or field, setting.doc
    default = setting.default if default is MISSING else default
    required = default is MISSING
    choices = "|".join(doc.range.choices) if doc.range else ""
    made = typer.Option(
        *([f"--{name.replace('_', '-')}"] if setting.type is bool else []),
        help=f"{doc.text} [required]" if required else doc.text,
        metavar=doc.metavar or choices or None,
        rich_help_panel=doc.panel or None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if required else default,
        annotation=Annotated[setting.hint, made],
    )


def with_options(*options: inspect.Parameter) -> Callable[[Command], Command]:
    """Give a command further options, which it receives as keyword arguments.

    In `--help` they come after the command's positional parameters, before its keyword-only ones.
    """

    def decorate(command: Command) -> Command:
        # Not `get_type_hints`: in Python 3.10 it wraps the hint of a parameter whose default is None.
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        positional = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
        signature = inspect.Signature([*positional, *options, *own[len(positional) :]])
        command.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
        return command

    return decorate
