"""Headers of a TAR that anybody may have written."""

import errno
import tarfile
from collections.abc import Iterator
from typing import BinaryIO


def regular_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular members, in order.

    Raises:
        tarfile.ReadError: damaged. (The standard library raises whatever a damaged number leads it to, and walks
            backwards for a negative size, in older versions for ever.)
        OSError: the file cannot be read.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"negative size of member {member.name!r}")
                if member.isreg():
                    yield member
    except (ValueError, OverflowError) as error:
        raise tarfile.ReadError(f"damaged header ({error})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which says of a position that there cannot be one
            raise
        raise tarfile.ReadError(f"damaged header ({error})") from error
