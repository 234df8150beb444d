"""Options that have another name now. The former name works for one release; a warning names the new one."""

import logging
from collections.abc import Sequence

from opt_ds.errors import UserError

_LOG = logging.getLogger(__name__)
#: Command -> former name of an option -> its name.
FORMER_OPTIONS = {
    "prepare": {"--shard": "--partition"},
    "inspect": {"--pictures": "--images"},
    "image-generation": {"--pictures": "--images", "--paint": "--generate"},
    "localized-narratives": {"--recordings": "--audio"},
}


def with_current_options(command: str | None, args: Sequence[str]) -> list[str]:
    """Return a command's arguments with the current names of options, and log a warning for each former one.

    Raise UserError if an option is given by both names.
    """
    names = FORMER_OPTIONS.get(command or "", {})
    options = [arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else len(args)]]
    current = list(args)
    for place, former in enumerate(options):
        if former not in names:
            continue
        option = names[former]
        if option in options:
            raise UserError(f"{former} is the former name of {option}: give one of them")
        current[place] = option + args[place].removeprefix(former)
        _LOG.warning(f"the option {former} is now called {option}; the former name works until the next release")
    return current
