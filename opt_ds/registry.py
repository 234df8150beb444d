"""Units found by name: built-in ones, those that installed packages announce as entry points, and `module:Class`.

A unit is one class in one file, such as a pre-training task. A package of opt_ds lists its built-in units in `BUILT_IN`. Another
package announces its own in its pyproject.toml, for example

    [project.entry-points."opt_ds.tasks"]
    my_task = "my_package.my_module:MyTask"

Entry points and `module:Class` are only loaded where a configuration names them: installing a package changes no run.

`module:Class` runs whatever that module holds. So it is only followed where the user names it: in the configuration of this
command, or in the environment variable OPT_DS_PLUGINS. A checkpoint or an exported model, which may be a stranger's, cannot name
one alone.
"""

import importlib
import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from opt_ds.errors import UserError, did_you_mean

#: `module:Class`, separated by commas, that files may name.
PLUGINS_VARIABLE = "OPT_DS_PLUGINS"


class Registry:
    """The units of one kind."""

    def __init__(self, kind: str, package: str) -> None:
        """Describe where the units are found.

        Args:
            kind: What messages call one, for example "task".
            package: The package with the built-in units, and the name of the entry points' group.
        """
        self.kind, self.package = kind, package
        self._allowed: set[str] = set()

    def allow(self, names: Iterable[str]) -> None:
        """Follow these `module:Class` from now on: the user has named them."""
        self._allowed.update(names)

    def units(self, further: Iterable[str] = ()) -> dict[str, Any]:
        """Return name -> class: the built-in units in their order, then the further ones.

        Raises UserError for a name that no package announces, a class that cannot be imported, and a name given twice.
        """
        found = {name: _loaded(path, self.kind) for name, path in self._built_in().items()}
        for given in further:
            unit = self.load(given)
            if unit.name in found:
                raise UserError(f'{self.kind} "{given}": there is already a {self.kind} of the name "{unit.name}": rename one')
            found[unit.name] = unit
        return found

    def load(self, given: str) -> Any:
        """Return the class of one unit, from its name or `module:Class`. Raises UserError."""
        if ":" in given:
            if given not in self._allowed and given not in os.environ.get(PLUGINS_VARIABLE, "").split(","):
                raise UserError(
                    f"{self.kind} {given}: a file names it, and using it runs its code: if you trust it, set the environment "
                    f"variable {PLUGINS_VARIABLE}={given}"
                )
            return _loaded(given, self.kind)
        if path := self._built_in().get(given):
            return _loaded(path, self.kind)
        announced = {entry.name: entry.value for entry in entry_points(group=self.package)}
        if given not in announced:
            known = [*self._built_in(), *announced]
            raise UserError(
                f'no {self.kind} "{given}"{did_you_mean(given, known)}: name one that an installed package announces '
                f'(entry points "{self.package}"), or write module:Class'
            )
        return _loaded(announced[given], self.kind)

    def _built_in(self) -> dict[str, str]:
        return importlib.import_module(self.package).BUILT_IN


@cache
def _loaded(path: str, kind: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise  # a module that the unit itself needs
        raise UserError(
            f'{kind} "{path}": no module "{module}" can be imported: install it, or add its folder to PYTHONPATH'
        ) from None
    except AttributeError:
        raise UserError(f'{kind} "{path}": the module has no class "{name}"') from None


TASKS = Registry("task", "opt_ds.tasks")
MODALITIES = Registry("modality", "opt_ds.modalities")
EXTRACTORS = Registry("extractor", "opt_ds.features")
