"""The MiniCPM-V tokenizer: Qwen's byte-level BPE plus the control tokens of images, frames and boxes."""

from operator import attrgetter
from typing import Any

from .compat_minicpmv import TokenizerBase


def _id_of(token: str) -> property:
    """A read-only attribute: the id of `token` in whatever vocabulary is loaded."""

    def get(self: Any) -> int:
        token_id = self.backend_tokenizer.token_to_id(token)
        if token_id is None:  # convert_tokens_to_ids would answer with <unk>, which is the image slot
            raise ValueError(f"the vocabulary has no token {token!r}; add it to `added_tokens` in tokenizer.json")
        return token_id

    return property(get, doc=f"Id of {token!r}.")


class MiniCPMVTokenizerFast(TokenizerBase):
    """Qwen2's tokenizer with the attributes that MiniCPM-V software reads.

    Ids are looked up by name, so a checkpoint with a small vocabulary works with the same class.
    The same names stand in `extra_special_tokens` of tokenizer_config.json for readers without remote code.
    """

    image_token = "<unk>"  # the slot that one image feature replaces
    image_token_id = _id_of(image_token)
    newline_id = _id_of("Ċ")  # "\n" in the byte-level alphabet
    im_start, im_end = "<image>", "</image>"
    slice_start, slice_end = "<slice>", "</slice>"
    im_id_start, im_id_end = "<image_id>", "</image_id>"
    ref_start, ref_end = "<ref>", "</ref>"
    box_start, box_end = "<box>", "</box>"
    quad_start, quad_end = "<quad>", "</quad>"
    point_start, point_end = "<point>", "</point>"
    im_start_id, im_end_id = _id_of(im_start), _id_of(im_end)
    slice_start_id, slice_end_id = _id_of(slice_start), _id_of(slice_end)
    im_id_start_id, im_id_end_id = _id_of(im_id_start), _id_of(im_id_end)
    ref_start_id, ref_end_id = _id_of(ref_start), _id_of(ref_end)
    box_start_id, box_end_id = _id_of(box_start), _id_of(box_end)
    quad_start_id, quad_end_id = _id_of(quad_start), _id_of(quad_end)
    point_start_id, point_end_id = _id_of(point_start), _id_of(point_end)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.backend_tokenizer.get_vocab_size(with_added_tokens=False) < 256:  # not even a token for each byte
            remedy = "Make it with `minicpmv build-tokenizer FOLDER` (in a clone: `make demo`)."
            raise ValueError(f"This tokenizer has no vocabulary: tokenizer.json is missing in its folder. {remedy}")

    bos_id = property(attrgetter("bos_token_id"), doc="Id of `<|im_start|>`.")
    eos_id = property(attrgetter("eos_token_id"), doc="Id of `<|im_end|>`.")
    unk_id = property(attrgetter("unk_token_id"), doc="Id of the image slot.")
