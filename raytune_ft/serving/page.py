"""The chat page's files, from the checkout or from the installed package."""

from __future__ import annotations

from pathlib import Path

from raytune_ft.errors import ServeError

MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "settings.js": "text/javascript; charset=utf-8",
    "thread.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def page_folder() -> Path:
    """Return the folder of the page: `raytune_ft/serve/page` in a wheel, else `serve/page`."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "serve" / "page", package.parent / "serve" / "page"):
        if (folder / "index.html").is_file():
            return folder
    raise ServeError(f"{package}: the chat page is missing; install raytune_ft again")


def page_files() -> dict[str, tuple[bytes, str]]:
    """Read the page's files: name -> content and media type. Nothing else is ever served."""
    folder = page_folder()
    return {name: ((folder / name).read_bytes(), kind) for name, kind in MEDIA_TYPES.items()}
