"""Which URLs shards may have, and how a URL is shown."""

import re

from trainer.errors import ConfigError

SCHEMES = ("s3", "https", "hf")


def scheme_of(text: str) -> str | None:
    """'s3' of s3://...; also what is refused: 'pipe' of pipe:..., 'simplecache' of a chain. None for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)|(pipe):", text)
    return (match[1] or match[2]) if match else None


def check_scheme(pattern: str) -> None:
    """Raises ConfigError for anything but a local path or a plain URL of SCHEMES."""
    scheme = scheme_of(pattern)
    if scheme == "https" and re.search(r"[*{}]", pattern.partition("?")[0]):
        raise ConfigError(
            f"'{shown(pattern)}': a web server has no list of its files; write a range, as in data-{{000..099}}.tar"
        )
    if scheme is None or (scheme in SCHEMES and pattern.startswith(f"{scheme}://")):
        return
    reason = {
        "http": "; over http:// nothing protects the data from being changed on its way: use https://",
        "pipe": "; data must not run commands: download the shards first",
    }.get(scheme, "")
    allowed = ", ".join(f"{known}://" for known in SCHEMES)
    raise ConfigError(f"'{shown(pattern)}': shards are local paths or {allowed}, not '{scheme}'{reason}")


def shown(text: str) -> str:
    """A URL, or a message with URLs, without queries and passwords: these may be secret."""
    return re.sub(r"\?[^\s'\"]*", "", re.sub(r"(https?://)[^/@\s]*@", r"\1", text))
