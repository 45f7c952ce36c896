"""The page for those who come from diffusion-pipe, made from the tables by which its files are read."""

from collections.abc import Iterator, Mapping

from utils.settings.differences import DIFFERENCES, Difference
from utils.settings.diffusion_pipe import FLAGS, FOREIGN, SAME, SAME_FLAGS, TYPES
from utils.settings.foreign import Foreign, ForeignType

_HEAD = """# Coming from diffusion-pipe

Its TOML files can be given to `train.py` as they are. A line that changes nothing here is passed over with a warning,
one that says the same in other words is read, and one that cannot be read is refused with what to write instead, all
in one message and before anything is loaded. This page is generated from the tables by which that is done.

A model is read from a folder in diffusers' layout, which `diffusers_path` names, or from the single files of ComfyUI's
users ([single files](single_files.md)). Data lies as it does
there; the cache is made anew, in a folder of its own.

In the tables, *the same* is a key of the same name and meaning, *read* one in whose place ours is used, *not needed*
one that is passed over, and *refused* one with which no run starts. Where the same word does not mean quite the same, a
run says so, if its files are diffusion-pipe's.
"""
_TITLES: Mapping[str, str] = {
    "run": "The run's own keys",
    "model": "`[model]`",
    "adapter": "`[adapter]`",
    "optimizer": "`[optimizer]`",
    "monitoring": "`[monitoring]`",
    "dataset": "The dataset file, and `[[directory]]`",
    "directory": "`[[directory]]` alone",
}
_FILES = """## Files in a run's folder

`save` and `save_quit` do what they do there: after the current step a checkpoint is written, and with `save_quit` the
run ends. The file is removed when that is done. `sample`, `eval` and `stop` ask for [more](samples.md).
"""


def foreign_page() -> str:
    """`docs/coming_from_diffusion_pipe.md`."""
    sections = [_HEAD]
    sections += [f"## {title}\n\n{_table('key', _keys(place))}" for place, title in _TITLES.items()]
    sections += [
        f"### `type` in `[{place}]`\n\n{_table('type', ((name, _of_type(kind)) for name, kind in types.items()))}"
        for place, types in TYPES.items()
    ]
    flags = {name: f"the same word: {here}" if here else "the same" for name, here in SAME_FLAGS.items()}
    flags |= {name: _of_key(foreign) for name, foreign in FLAGS.items()}
    sections.append(f"## The command line\n\n{_table('flag', ((f'--{name}', said) for name, said in flags.items()))}")
    return "\n".join([*sections, _FILES])


def _keys(place: str) -> Iterator[tuple[str, str]]:
    others = {difference.key: difference for difference in DIFFERENCES if difference.place == place}
    for key in SAME.get(place, ()):
        yield key, _of_same(others.pop(key, None))
    for key, difference in others.items():
        yield key, _of_same(difference)
    inherited = FOREIGN["dataset"] if place == "directory" else {}
    for key, foreign in FOREIGN.get(place, {}).items():
        if key not in inherited:
            yield key, _of_key(foreign)


def _of_same(difference: Difference | None) -> str:
    return f"the same word: {difference.here}" if difference else "the same"


def _of_key(foreign: Foreign) -> str:
    if foreign.keys is not None:
        return f"read: {foreign.advice.removeprefix('write instead: ')}"
    # What is harmless with any value, is so with one that nobody writes.
    if foreign.harmless(object()):
        return f"not needed: {foreign.why_harmless}"
    return f"refused{', unless it changes nothing' if foreign.may_be_harmless else ''}; {foreign.advice}"


def _of_type(kind: ForeignType) -> str:
    return f"read: `{kind.means}`; {kind.note}" if kind.means else f"refused; {kind.note}"


def _table(heading: str, rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {heading} | here |", "|---|---|", *(f"| `{name}` | {said} |" for name, said in rows)]
    return "\n".join(lines) + "\n"
