"""A hook of mkdocs: pages link to files outside of docs/, as on a forge, and the site gets these files too.

A link to a folder, which a site cannot show, becomes its text.

References in docstrings, such as ``:class:`x.Y```, become code.
"""

import re
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([\w]+)`")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)\)")


class Roles(griffe.Extension):
    """Replaces references in docstrings by the last part of the name."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of ``obj``."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to outside of docs/."""
    for page in list(files.documentation_pages()):
        for _, _, link in LINK.findall(page.content_string):
            path = _target(page, link)
            if path is not None and path.is_file():
                name = path.relative_to(PROJECT).as_posix()
                if name not in files.src_uris:
                    files.append(File.generated(config, f"project/{name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the added files."""
    del config, files

    def redirect(match: re.Match[str]) -> str:
        picture, text, link = match.groups()
        path = _target(page.file, link)
        if path is None:
            return match[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: links to {link}, which is not in the project")
        if path.is_dir():
            return text
        depth = len(PurePosixPath(page.file.src_uri).parts) - 1
        return f"{picture}[{text}]({'../' * depth}project/{path.relative_to(PROJECT).as_posix()})"

    return LINK.sub(redirect, markdown)


def _target(page: File, link: str) -> Path | None:
    """Return the file of the project that ``link`` of ``page`` leads to; None if that is within docs/."""
    docs = PROJECT / "docs"
    path = (docs / page.src_uri).parent.joinpath(link).resolve()
    return None if path.is_relative_to(docs) else path
