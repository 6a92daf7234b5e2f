"""What the site does to the documents: pages of the repository's root, and links to files that are no page.

Documents link to each other and to sources by relative paths, which work where the repository is read. On the site a link to
CONTRIBUTING.md leads to its page, and one to a source file is that file's name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OF_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root of the repository."""
    from mkdocs.structure.files import File

    for source, page in OF_ROOT.items():
        if page != "index.md":
            text = relinked((ROOT / source).read_text(encoding="utf-8"), "", page)
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links that lead out of docs/."""
    path = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, posixpath.join("docs", posixpath.dirname(path)), path)


def relinked(text: str, folder: str, page: str) -> str:
    """The text of a file in `folder` of the repository, its links as the site's `page` has them."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
        if target in OF_ROOT:
            target = f"docs/{OF_ROOT[target]}"
        if not target.startswith("docs/"):
            return words
        return f"[{words}]({posixpath.relpath(target.removeprefix('docs/'), posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)
