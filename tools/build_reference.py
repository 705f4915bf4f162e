"""Build the pages of the reference, from docstrings, and of docs/, as HTML in out/docs/.

Pages of the reference have the public names (``__all__``) of MODULES. README and the Markdown pages
stand beside them, with their links. Whatever does not resolve is an error: a reference in a
docstring, a link, an anchor, a name without a docstring. Needs pdoc (extra "docs").
"""

from __future__ import annotations

import html
import os
import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pdoc import doc, render, render_helpers

from moe_kernels import __version__

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "out/docs"
TEMPLATES = Path(__file__).parent / "reference_pages"
MODULES = (
    "moe_kernels",
    "moe_kernels.analysis",
    "moe_kernels.backends",
    "moe_kernels.conversion",
    "moe_kernels.imaging",
    "moe_kernels.init",
    "moe_kernels.layers",
    "moe_kernels.modalities",
    "moe_kernels.moextend",
    "moe_kernels.ops",
    "moe_kernels.training",
)
PAGES = (
    "*.md",
    "docs/**/*.md",
    "benchmarks/*.md",
    "examples/*.md",
    "python/*.md",
    "moe_kernels/**/*.md",
)
# Public members that a class has from one of this package that is not public itself.
INHERITED = {
    "PatchedModel": (
        "adapters_disabled",
        "adapters_enabled",
        "added_tokens_enabled",
        "modality_token_ids",
        "text_only",
    )
}
# Classes whose constructor nobody calls: a function gives their objects, or they are an interface.
MADE = ("AcceleratedPeft", "ImageTokenizer", "PatchedModel", "VQTokenizer")
ROLE = re.compile(r":(mod|func|data|class|meth):`([^`]+)`")
FENCED = re.compile(r"(^( *)```.*?^\2```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
STARRED = re.compile(r"^ +\*{1,2}(?=\w+:)", re.MULTILINE)  # in a list of arguments
PAGE = re.compile(r"\bdocs/[\w/]+\.md\b")
SIGNATURE = re.compile(r'^.*<span class="(?:signature|annotation)\b.*$', re.MULTILINE)
MODULE_OF_TYPE = re.compile(r'(?:<span class="n">\w+</span><span class="o">\.</span>)+(?=<span)')


class Guide(NamedTuple):
    """A page of Markdown: its path in the repository, its title and where its HTML goes."""

    path: PurePosixPath
    title: str

    @property
    def target(self) -> PurePosixPath:
        index = str(self.path) == "README.md"
        return PurePosixPath("index.html") if index else self.path.with_suffix(".html")


def guides() -> list[Guide]:
    """List the Markdown pages, README first."""
    files = sorted({file for pattern in PAGES for file in ROOT.glob(pattern)})
    found = [
        Guide(
            PurePosixPath(file.relative_to(ROOT).as_posix()),
            file.read_text().partition("\n")[0].removeprefix("# "),
        )
        for file in files
    ]
    return sorted(found, key=lambda guide: (str(guide.path) != "README.md", str(guide.path)))


# --- the reference


def public_modules() -> dict[str, doc.Module]:
    """Return the modules as pdoc sees them, with their public names alone, by name."""
    modules = {}
    for name in MODULES:
        module = import_module(name)
        for each in module.__all__:
            vars(module).setdefault(each, getattr(module, each))  # some are imported late
        modules[name] = doc.Module(module)
        for member in modules[name].members.values():
            if isinstance(member, doc.Class):
                leave_public(member)
    return modules


def leave_public(cls: doc.Class) -> None:
    """Take from a class what users have no use for."""
    cls.own_members = members(cls)
    cls.members = {each.name: each for each in cls.own_members}
    for each in cls.own_members:
        if each.docstring.startswith("Create new instance of"):  # of a NamedTuple
            each.docstring = ""
    cls.bases = [
        (base.__module__, base.__qualname__, base.__name__)
        for base in cls.obj.__bases__
        if base is not object and (is_public(base) or not is_ours(base))
    ]


def members(cls: doc.Class) -> list[doc.Doc]:
    """List the members of a class that this package gives it, its constructor first."""
    own = {each.name for each in cls.own_members if not isinstance(each, doc.Class)}
    for base in filter(is_public, cls.obj.__mro__[1:]):
        own |= vars(base).keys() & cls.members.keys()
    own |= set(INHERITED.get(cls.name, ()))
    if cls.name in MADE:
        own.discard("__init__")
    shown = [each for each in cls.members.values() if each.name in own and is_shown(each)]
    return sorted(shown, key=lambda each: each.name != "__init__")


def is_public(cls: type) -> bool:
    """Return whether a class is a public name of the package."""
    return is_ours(cls) and any(cls.__name__ in import_module(name).__all__ for name in MODULES)


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("moe_kernels.")


def is_shown(member: doc.Doc) -> bool:
    """Return whether a member has a place of its own: fields are in the text of their class."""
    if member.name.startswith("_"):
        return member.name == "__init__"
    if not isinstance(member, doc.Variable):
        return True
    return bool(member.docstring) and not member.docstring.startswith("Alias for field number")


def documented(modules: dict[str, doc.Module]) -> list[doc.Doc]:
    """List the modules, their public names and the members of their classes."""
    names = [each for module in modules.values() for each in module.members.values()]
    inner = [each for cls in names if isinstance(cls, doc.Class) for each in cls.own_members]
    return [*modules.values(), *names, *inner]


def as_markdown(docstring: str) -> str:
    """Put examples into blocks of code, and keep the stars of ``**options``; pdoc does the rest."""
    lines, block = [], None
    for line in [*docstring.splitlines(), ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if block is None and line.lstrip().startswith(">>> "):
            lines.append(f"{indent}```pycon")
            block = indent
        elif block is not None and (not line.strip() or not line.startswith(block)):
            lines.append(f"{block}```")
            block = None
        lines.append(line)
    text = "\n".join(lines).replace("::\n\n", ":\n\n").rstrip("\n")
    return STARRED.sub(lambda name: name[0].replace("*", r"\*"), text)


def module_html(name: str, modules: dict[str, doc.Module]) -> str:
    """Render the page of a module."""
    text = render.html_module(modules[name], modules)
    # A type is named as in a program, without the module in which its library has it.
    text = SIGNATURE.sub(lambda line: MODULE_OF_TYPE.sub("", line[0]), text)
    up = "../" * name.count(".")
    return PAGE.sub(lambda m: f'<a href="{up}{m[0].removesuffix(".md")}.html">{m[0]}</a>', text)


# --- the pages of Markdown


def guide_html(guide: Guide, pages: list[Guide]) -> str:
    """Convert a page, with links to the HTML of other pages, and anchors as GitHub has them."""
    targets = {page.path: page.target for page in pages}

    def relink(link: re.Match[str]) -> str:
        file, mark, fragment = link[2].partition("#")
        if ":" in file or not file:
            return link[0]
        path = PurePosixPath(os.path.normpath(guide.path.parent / file))
        relative = os.path.relpath(targets.get(path, path), guide.target.parent)
        return f"{link[1]}{relative}{mark}{fragment}{link[3]}"

    parts = FENCED.split((ROOT / guide.path).read_text())[::3]
    fences = [found[0] for found in FENCED.finditer((ROOT / guide.path).read_text())]
    pieces = [LINK.sub(relink, part) for part in parts]
    text = "".join(a + b for a, b in zip(pieces, [*fences, ""], strict=True))
    return re.sub(
        r'<h(\d) id="[^"]*">(.*?)</h\1>', with_anchor, str(render_helpers.to_html(text)), flags=re.S
    )


def with_anchor(heading: re.Match[str]) -> str:
    plain = html.unescape(re.sub("<[^>]*>", "", heading[2]))
    anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
    return f'<h{heading[1]} id="{anchor}">{heading[2]}</h{heading[1]}>'


def copy_linked(guide: Guide, folder: Path) -> None:
    """Copy the files that a page shows or links, other pages excepted."""
    for _, target, _ in LINK.findall(FENCED.sub("", (ROOT / guide.path).read_text())):
        source = (ROOT / guide.path.parent / target.partition("#")[0]).resolve()
        if source.is_file() and source.suffix != ".md":
            copied = folder / source.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copied)


# --- all of it


def build(folder: Path) -> list[str]:
    """Write all pages into an empty folder; return what does not resolve."""
    modules, pages = public_modules(), guides()
    render.configure(docformat="google", template_directory=TEMPLATES, show_source=False)
    render.env.globals |= {"guides": pages, "modules": MODULES, "version": __version__}
    problems = write_reference(modules, folder)
    template = render.env.get_template("guide.html.jinja2")
    for guide in pages:
        options = {"guide": guide, "text": guide_html(guide, pages)}
        write(folder / guide.target, template.render(**options))
        copy_linked(guide, folder)
    return problems + broken_links(folder)


def write_reference(modules: dict[str, doc.Module], folder: Path) -> list[str]:
    """Write a page for each module; return the docstrings and references that are missing."""
    every = documented(modules)
    problems = [f"{each.fullname} has no docstring" for each in every if lacks_docstring(each)]
    roles = {each.fullname: ROLE.findall(each.docstring) for each in every}
    for each in every:
        each.docstring = as_markdown(each.docstring)
    for name in modules:
        text = module_html(name, modules)
        write(folder / f"{name.replace('.', '/')}.html", text)
        problems += [
            f"{each.fullname}: {target}"
            for each in every
            if each.modulename == name
            for kind, target in roles[each.fullname]
            if f">{target}{'()' * (kind in ('func', 'meth'))}</a>" not in text
        ]
    write(folder / "search.js", render.search_index(modules))
    return problems


def lacks_docstring(member: doc.Doc) -> bool:
    return not (member.docstring or isinstance(member, doc.Variable) or member.name == "__init__")


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def broken_links(folder: Path) -> list[str]:
    """List the links within the pages that lead nowhere."""
    text = {file.resolve(): file.read_text() for file in folder.rglob("*.html")}
    ids = {file: set(re.findall(r'\bid="([^"]+)"', each)) for file, each in text.items()}
    problems = []
    for file, each in text.items():
        for link in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^":$]*)"', each):
            path, _, fragment = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            if not target.is_file() or (fragment and fragment not in ids.get(target, {fragment})):
                problems.append(f"{file.relative_to(folder.resolve())}: {link}")
    return problems


def main() -> None:
    warnings.filterwarnings("error", module=r"pdoc\.")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    if problems := build(OUTPUT):
        sys.exit("does not resolve:\n" + "\n".join(problems))
    print(f"{OUTPUT / 'index.html'}: {len(MODULES)} modules, {len(guides())} pages")


if __name__ == "__main__":
    main()
