#!/usr/bin/env python3
"""Plants a deliberate bug (a mutant) in the sources.

  plant.py check                 every mutant fits the sources as they are; prints how many there are
  plant.py list                  each with what finds it and what is wrong with it
  plant.py model NAME            what finds it: simulator, program, shuttle or agents
  plant.py plant NAME FROM TO    reads the sources below FROM, writes the files that it changes below TO and prints their names

A mutant is a file NAME.mutant: a sentence that says what is wrong, perhaps a line `Model: shuttle`, `Model: program`,
`Model: agents` or `Model: fuzz:TARGET`, then edits. Blank lines stand between them.

  The leader of a flush syncs nothing.
  Model: shuttle

  In: impl Log
  In: fn flush
  - io.sync(Device::Data).await
  + Ok(())

The text of the `-` lines is found and that of the `+` lines put in its place. It is looked for in all sources, so that code can
move to another file, and token by token, so that rustfmt can wrap it elsewhere: spaces, line ends and comments don't count. It
must be there exactly once. Where it is there more often, `In:` lines narrow it to what stands in braces behind that text.
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("src", "ublk-target/src", *(f"ublk-target/agents/{agent}/src" for agent in ("protocol", "etcd", "tpm")))
FUZZ_TARGETS = ("superblock", "identity", "record", "page", "recovery")
MODELS = ("simulator", "program", "shuttle", "agents", *(f"fuzz:{target}" for target in FUZZ_TARGETS))
# Literals first: `//` in a string begins no comment.
COMMENT = re.compile(r"""b?r(\#+)".*?"\1 | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])' | (?P<comment>//[^\n]*)""", re.X | re.S)


class Unfit(Exception):
    """What is wrong with a mutant, in one line or more."""


class Source:
    """A source file; `code` is as long as `text`, with blanks for comments."""

    def __init__(self, root, path):
        self.name = str(path.relative_to(root))
        self.text = path.read_text()
        self.code = COMMENT.sub(lambda m: " " * len(m[0]) if m["comment"] else m[0], self.text)

    def place(self, at):
        return f"{self.name}:{self.text.count(chr(10), 0, at) + 1}"


def read_sources(root):
    root = Path(root)
    return [Source(root, path) for folder in SOURCES for path in sorted((root / folder).rglob("*.rs"))]


def pattern(text):
    """Finds `text` whatever spaces and line ends are between its tokens."""
    tokens = re.findall(r"\w+|[^\w\s]", text)
    joined = re.escape(tokens[0])
    for before, token in zip(tokens, tokens[1:]):
        words = (before[-1] + token[0]).replace("_", "a").isalnum()
        joined += (r"\s+" if words else r"\s*") + re.escape(token)
    return re.compile(rf"(?<!\w){joined}(?!\w)" if tokens[-1][-1].isalnum() else joined)


def body_after(code, at):
    """Where the item whose header is at `at` begins and ends. The sources are formatted: a closing brace is indented as its item is."""
    start = code.rfind("\n", 0, at) + 1
    indent = re.match(r" *", code[start:])[0]
    for line in re.finditer(r"[^\n]*\n", code[start:]):
        if line[0].rstrip().endswith((";", "}")):  # without a body, or all in one line
            return start, start + line.end()
        if line[0].rstrip().endswith("{"):
            end = code.find(f"\n{indent}}}", start + line.end() - 1)
            return start, end if end >= 0 else len(code)
    return start, len(code)


class Edit:
    """Replaces `old`, which is found once within the bodies of `scopes`, by `new`."""

    def __init__(self, block):
        self.scopes, old, new = [], [], []
        for line in block.splitlines():
            if line.startswith("In: ") and not old and not new:
                self.scopes.append(line[4:].strip())
            elif line.startswith("-") and not new:
                old.append(line[1:])
            elif line.startswith("+"):
                new.append(line[1:])
            else:
                raise Unfit(f"neither `In: TEXT`, `- TEXT` nor `+ TEXT`, or not in this order: {line}")
        self.old = "\n".join(old).strip()
        self.new = [line.removeprefix(" ") for line in new]
        if not re.search(r"\S", self.old):
            raise Unfit("an edit has no text to look for (`- TEXT`)")
        self.words = set(re.findall(r"\w+", "\n".join([*self.scopes, self.old])))

    def find(self, sources):
        """The source and the span of the one place."""
        found = [(source, start, end) for source in sources for start, end in self.spans(source.code)]
        if len(found) == 1:
            return found[0]
        where = "".join(f" in `{scope}`" for scope in reversed(self.scopes))
        if not found:
            raise Unfit(f"this text is nowhere{where}:\n    {self.old}")
        places = ", ".join(source.place(start) for source, start, _ in found)
        raise Unfit(f"this text is there {len(found)} times{where} ({places}); narrow it by a line `In: TEXT`:\n    {self.old}")

    def spans(self, code):
        if not all(word in code for word in self.words):  # far sooner known than by the patterns
            return []
        within = [(0, len(code))]
        for scope in self.scopes:
            header = pattern(scope)
            within = [body_after(code, m.start()) for start, end in within for m in header.finditer(code, start, end)]
        text = pattern(self.old)
        return sorted({m.span() for start, end in within for m in text.finditer(code, start, end)})

    def replacement(self, source, start):
        line = source.text[source.text.rfind("\n", 0, start) + 1 : start]
        indent = re.match(r" *", line)[0]
        return ("\n" + indent).join(self.new)


class Mutant:
    def __init__(self, name):
        self.name = name
        path = HERE / f"{name}.mutant"
        if not path.exists():
            raise Unfit("there is no such mutant; scripts/mutants --list names them")
        head, *blocks = re.split(r"\n(?:[ \t]*\n)+", path.read_text().strip("\n"))
        lines = head.splitlines()
        models = [line[6:].strip() for line in lines if line.startswith("Model:")]
        self.about = " ".join(line for line in lines if not line.startswith("Model:"))
        self.model = models[0] if models else MODELS[0]
        if not self.about or lines[0].startswith(("Model:", "In:", "-", "+")):
            raise Unfit("its first line must say what is wrong")
        if len(models) > 1 or self.model not in MODELS:
            raise Unfit(f"one `Model:` at most, of {', '.join(MODELS)}: {', '.join(models)}")
        if not blocks:
            raise Unfit("it changes nothing")
        self.edits = [Edit(block) for block in blocks]

    def changed(self, sources):
        """The new text of each file that it changes, by the file's name."""
        by_source = {}
        for edit in self.edits:
            source, start, end = edit.find(sources)
            by_source.setdefault(source, []).append((start, end, edit))
        result = {}
        for source, places in by_source.items():
            # From the end, so that what is before keeps its place.
            places.sort(key=lambda place: place[0], reverse=True)
            text = source.text
            for n, (start, end, edit) in enumerate(places):
                if n > 0 and end > places[n - 1][0]:
                    raise Unfit(f"two edits overlap at {source.place(start)}")
                text = text[:start] + edit.replacement(source, start) + text[end:]
            if text == source.text:
                raise Unfit("it changes nothing")
            result[source.name] = text
        return result


def names():
    found = sorted(path.stem for path in HERE.glob("*.mutant"))
    if not found:
        raise Unfit(f"there are none in {HERE}")
    return found


def check():
    sources = read_sources(HERE.parent.parent)
    wrong = 0
    for name in names():
        try:
            Mutant(name).changed(sources)
        except Unfit as e:
            wrong += 1
            print(f"{name}: {e}")
    print(f"{len(names())} mutants, {wrong} of them don't fit the sources")
    return 1 if wrong else 0


def plant(name, source, to):
    for path, text in Mutant(name).changed(read_sources(source)).items():
        (Path(to) / path).write_text(text)
        print(path)


def main(args):
    match args:
        case ["check"]:
            return check()
        case ["list"]:
            for mutant in map(Mutant, names()):
                print(f"{mutant.name:28} {mutant.model:15} {mutant.about}")
        case ["model", name]:
            print(Mutant(name).model)
        case ["plant", name, source, to]:
            plant(name, source, to)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unfit as e:
        print(f"{sys.argv[2] if len(sys.argv) > 2 else 'mutants'}: {e}", file=sys.stderr)
        sys.exit(2)
