"""Numbers and structs of the NBD protocol (big-endian), with the names of the public protocol document.

Handshake: `INIT_MAGIC`, `OPTION_MAGIC`, flags; then options (16-byte header, data) and option replies (20-byte
header, data). Transmission: requests of 28 bytes (a WRITE's data follows), simple replies of 16 bytes, and
structured replies as chunks with a header of 20 bytes.
"""

from __future__ import annotations

import errno
import struct

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

OPTION = struct.Struct(">8sII")  # IHAVEOPT, option, length of data
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, kind of reply, length of data
REQUEST = struct.Struct(">IHH8sQI")  # magic, flags, command, cookie, offset, length
REQUEST_HEAD = struct.Struct(">Q8sQI")  # the same with magic, flags and command as one number
REQUEST_BYTES = REQUEST.size
SIMPLE = struct.Struct(">II8s")  # magic, error, cookie
SIMPLE_BYTES = SIMPLE.size
CHUNK = struct.Struct(">IHH8sI")  # magic, flags, kind, cookie, length of payload
CHUNK_BYTES = CHUNK.size
CHUNK_DATA = struct.Struct(">IHH8sIQ")  # the same, then the offset: the head of an OFFSET_DATA chunk
CHUNK_DATA_BYTES = CHUNK_DATA.size
CHUNK_HOLE = struct.Struct(">IHH8sIQI")  # an OFFSET_HOLE chunk, whole
CHUNK_ERROR = struct.Struct(">IH")  # error, length of a message

# Handshake flags, server then client.
FLAG_FIXED_NEWSTYLE = FLAG_C_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = FLAG_C_NO_ZEROES = 2

# Transmission flags.
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = 16, 32, 64, 128
CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 1 << 8, 1 << 10, 1 << 11

# Options.
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS = 1, 2, 3, 5
OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY = 6, 7, 8
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 9, 10

# Kinds of option reply; errors have the highest bit.
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = REP_ERROR + 1, REP_ERROR + 2, REP_ERROR + 3
REP_ERR_UNKNOWN, REP_ERR_SHUTDOWN, REP_ERR_TOO_BIG = REP_ERROR + 6, REP_ERROR + 7, REP_ERROR + 9

# Kinds of information in a REP_INFO.
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# Commands.
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)

# Command flags.
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16

# Chunks of a structured reply.
CHUNK_DONE = 1
TYPE_NONE, TYPE_OFFSET_DATA, TYPE_OFFSET_HOLE, TYPE_BLOCK_STATUS = 0, 1, 2, 5
TYPE_ERROR, TYPE_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2

# `base:allocation` flags of an extent.
BASE_ALLOCATION = "base:allocation"
STATE_HOLE, STATE_ZERO = 1, 2

MIN_BLOCK_BYTES = 1
PREFERRED_BLOCK_BYTES = 4096
# The largest payload; the de-facto limit of NBD peers (QEMU, libnbd, nbdkit).
MAX_PAYLOAD_BYTES = 32 << 20
# The document's limit for names and other strings.
MAX_STRING_BYTES = 4096

# Every error that may be on the wire; what is not in it is an EIO there.
_WIRE_ERRORS = {
    errno.EPERM: 1, errno.EIO: 5, errno.ENOMEM: 12, errno.EINVAL: 22, errno.ENOSPC: 28, errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95, errno.ESHUTDOWN: 108,
    errno.EROFS: 1, errno.EACCES: 1, errno.EFBIG: 28, errno.EDQUOT: 28,
}  # fmt: skip


def wire_error(number: int) -> int:
    """The protocol's number for an errno of this machine."""
    return _WIRE_ERRORS.get(number, 5)


class ProtocolError(Exception):
    """The peer broke the protocol: its connection is given up, nobody else's. The text is the reason."""
