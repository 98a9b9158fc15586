"""Images and videos that strangers name in their messages -> bytes.

What is special:
- Only addresses of the public internet are fetched, unless their host was named when the server was started: else the
  server would read for a stranger what only its own network may see. The address that is checked is the one connected
  to, also after a redirect, so a name that changes its address in between gains nothing.
- One request has one budget of seconds, bytes and pixels for all its images and videos. Pixels are counted from the
  headers, before anything is decoded; only formats are opened whose headers say it at once.
- A video is known by its first bytes. FFmpeg would also take lists of other files and addresses for videos, and open them.
"""

import re
import socket
import struct
from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import anyio
import httpcore
from PIL import Image, UnidentifiedImageError

from minicpmv.errors import MiniCPMVError
from minicpmv.serving.limits import Limits, Room
from minicpmv.serving.schema import Message


MAX_REDIRECTS = 3
HEADERS: dict[bytes | str, bytes | str] = {"User-Agent": "minicpmv", "Accept": "image/*, video/*"}
VIDEOS = re.compile(
    rb"....(?:ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3|RIFF....(?:AVI |WEBP)|GIF8|\x89PNG|FLV|OggS|0&\xb2u"
    rb"|\x00\x00\x01[\xba\xb3]|G(?=.{187}G)",
    re.DOTALL,
)
ANIMATIONS = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP", re.DOTALL)
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "JPEG2000",
    "MPO",
    "PPM",
    "DIB",
    "ICO",
    "TGA",
    "QOI",
    "AVIF",
    "HEIF",
)
# Inside an IPv6 address of these stands an IPv4 one, which is where the packets go.
NAT64, LOCAL_NAT64 = ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48")
_REMOTE = re.compile("https?://", re.IGNORECASE)


class MediaError(MiniCPMVError):
    """An image or video that is not taken: the message names it, the limit and what to do."""


_FETCH_ERRORS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
)


async def read_messages(
    messages: Sequence[Message], limits: Limits, room: Room, folder: Path | None = None
) -> tuple[list[dict], int]:
    """Messages as the processor takes them, with the bytes of images and videos in them; and how many bytes those are.

    Args:
        room: takes the bytes that are fetched; the caller gives them back.
        folder: where paths may be read from; None refuses all.

    Raises:
        MediaError: an image or video cannot be fetched, is not one, or is beyond the limits.
        RequestError: other requests have fetched as much as all together may.
    """
    result, fetched = [], 0
    try:
        with anyio.fail_after(limits.seconds):
            for message in messages:
                role = "system" if message.role == "developer" else message.role
                turn = message.model_dump(exclude_none=True, exclude={"content", "role"}) | {"role": role}
                if message.content is not None:
                    turn["content"] = []
                    for part in message.content:
                        if part.type == "text":
                            turn["content"].append(part.model_dump(exclude_none=True))
                            continue
                        kind = part.type.removesuffix("_url")
                        address = getattr(part, part.type)
                        url = address.url
                        if url[:5].lower() == "data:":
                            data = await anyio.to_thread.run_sync(_decode, url)
                        elif folder is not None and not _REMOTE.match(url):
                            data = await anyio.to_thread.run_sync(_read_file, url, folder, limits)
                        else:
                            data = await fetch(url, limits, int(limits.megabytes * 1e6) - fetched)
                            room.take(len(data))
                            fetched += len(data)
                        turn["content"].append({"type": kind, kind: data, "name": url[:80], "detail": address.detail})
                result.append(turn)
    except TimeoutError as error:
        room.give_back(fetched)
        raise MediaError(
            f"the images and videos of this request did not come within {limits.seconds:g} seconds; send data URLs"
        ) from error
    except BaseException:
        room.give_back(fetched)
        raise
    return result, fetched


def check_media(messages: Sequence[dict], limits: Limits) -> tuple[list[tuple[int, int]], int]:
    """Look at the headers of images and videos (of `read_messages`), before anything is decoded. Returns the sizes (width,
    height) of the images, and the number of videos.

    Raises:
        MediaError: one is not what it is said to be, or they have more pixels or frames than a request may.
    """
    left, sizes, videos = int(limits.megapixels * 1e6), [], 0
    for part in (part for message in messages for part in message.get("content") or () if part["type"] != "text"):
        data, name = part[part["type"]], part.pop("name")
        frames = 1
        if part["type"] == "image":
            width, height, _ = _header(data, name)
            sizes.append((width, height))
        else:
            videos += 1
            if not VIDEOS.match(data):
                raise MediaError(
                    f"{name}: not a video; give MP4, MOV, Matroska, WebM, AVI, MPEG, WMV, FLV, Ogg, GIF, WebP or PNG"
                )
            if not ANIMATIONS.match(data):
                continue
            width, height, frames = _header(data, name)
        left -= width * height * frames
        if left < 0 or frames > limits.frames:
            raise MediaError(
                f"{name}: the images and the frames of animations of this request have more than {limits.megapixels:g} "
                f"megapixels, or an animation more than {limits.frames} frames; scale them down, or send animations as "
                "MP4, of which only the frames that are looked at are decoded"
            )
    return sizes, videos


def _read_file(url: str, folder: Path, limits: Limits) -> bytes:
    """The bytes of a file, named by its path in `folder` or by its whole path."""
    name = unquote(urlsplit(url).path) if url.startswith("file:") else url
    file, home = (folder / name).resolve(), folder.resolve()
    if not file.is_relative_to(home):
        raise MediaError(f"{url[:200]}: not in {home}, where the files of this run have to be")
    if not file.is_file():  # a named pipe would be waited for
        raise MediaError(f"{url[:200]}: no such file in {home}")
    if file.stat().st_size > limits.megabytes * 1e6:
        raise MediaError(f"{url[:200]}: larger than {limits.megabytes:g} MB; scale it down")
    return file.read_bytes()


async def fetch(url: str, limits: Limits, max_bytes: int) -> bytes:
    """The bytes at an http or https address.

    Raises:
        MediaError: it is not public, cannot be reached, answers with an error, or is larger than `max_bytes`.
    """
    name, target = url[:200], url
    try:
        async with httpcore.AsyncConnectionPool(network_backend=_CheckedNetwork(limits.hosts)) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                address = quote(target, safe="%/:?#[]@!$&'()*+,;=~")
                async with pool.stream("GET", address, headers=HEADERS) as response:
                    headers = {key.lower(): value.decode("latin-1") for key, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                        target = urljoin(target, headers[b"location"])
                        continue
                    if response.status != 200:
                        raise MediaError(f"{name}: its server answers with status {response.status}")
                    data = bytearray()
                    async for chunk in response.aiter_stream():
                        data += chunk
                        if len(data) > max_bytes:
                            raise MediaError(
                                f"{name}: the images and videos of this request are larger than "
                                f"{limits.megabytes:g} MB; scale them down"
                            )
                    return bytes(data)
    except MediaError:
        raise
    except (*_FETCH_ERRORS, OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be fetched ({error or type(error).__name__}); send a data URL") from error
    raise MediaError(f"{name}: more than {MAX_REDIRECTS} redirects; give the address that it ends at")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the public internet, and of one machine; so is the IPv4 address inside it, if any."""
    inner: Any = None
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and (address.teredo is not None or address in LOCAL_NAT64):
            return False
    address = address if inner is None else inner
    return address.is_global and not address.is_multicast


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to the named hosts."""

    def __init__(self, hosts):
        self._hosts, self._network = hosts, httpcore.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        addresses = [host]
        if host.lower() not in self._hosts:
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(address[0] for *_, address in found))
            for address in map(ip_address, addresses):
                if not is_public(address):
                    raise MediaError(
                        f"{host} is {address}, which is not on the public internet: send a data URL, or let the server be "
                        f"started with --media-host {host}"
                    )
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError as error:
                reason = error
        raise reason

    async def sleep(self, seconds):
        await self._network.sleep(seconds)


def _decode(url: str) -> bytes:
    head, comma, content = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma before its content")
        data = unquote_to_bytes(content)
        return b64decode(data) if head.lower().endswith(";base64") else data
    except ValueError as error:
        raise MediaError(f"data URL {url[:40]!r}... cannot be read ({error}); expected data:...;base64,...") from error


def _header(data: bytes, name: str) -> tuple[int, int, int]:
    """Width, height and number of frames of an image."""
    try:
        Image.init()
        with Image.open(BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
            return image.width, image.height, getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {error}; scale it down") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image in a format that is read here ({', '.join(FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error) as error:
        raise MediaError(f"{name}: cannot be read as an image ({error}); give a file that is not damaged") from error
