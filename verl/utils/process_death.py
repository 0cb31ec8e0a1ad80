"""Where a process writes its errors, and what is known of why one failed: for messages.

In: this process, or what Ray says of another. Out: a path, or one line.
"""

import os


def error_output() -> str | None:
    """The file that this process's errors go to; None where they go elsewhere, such as a terminal."""
    target = os.readlink("/proc/self/fd/2")
    return target if os.path.isfile(target) else None


def describe_death(ray_text: str) -> str:
    """Ray's account of a death in one line: it begins with ids, and what it knows of the reason comes last."""
    known = " ".join(ray_text.split()).rpartition("Worker exit detail: ")[2]
    reason, guesses, _ = known.partition(" Some common causes include:")
    return f"the process died: {reason}{' (killed, out of memory, or crashed)' if guesses else ''}"


def log_line(path: str | None, node_ip: str) -> str:
    """The line that says where the errors of a process are; it may not have lived long enough to tell."""
    return f"log: {path or 'not known'} on node {node_ip}"


def disk_full_text() -> str:
    """Ray's object store and the disk that it spills to are full, on this node."""
    return (
        "no room: Ray's object store is full, and so is the disk under /tmp/ray that it spills to; "
        "make room there, name another with ray_kwargs.ray_init._temp_dir, or raise "
        "ray_kwargs.ray_init.object_store_memory"
    )
