"""File descriptors: every connection takes one, and a process without a free one answers nobody."""

from kdexport.errors import ServerError

#: Descriptors besides connections: libraries, models, the event loop, and files and processes of a reload.
_OTHERS = 128


def require_descriptors(connections: int) -> None:
    """Raise the soft limit to what ``connections`` of requests and as many of metrics take.

    Raises ``ServerError`` if the hard limit is lower.
    """
    # Not every system has it, and this module is imported with the server.
    import resource

    needed = 2 * connections + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise ServerError(
            f"{connections} connections take up to {needed} file descriptors, but this process may open {hard}.",
            remedy=f"Raise its limit: ulimit -n {needed}, or lower --connections.",
        ) from error
