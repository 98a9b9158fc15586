"""The data sets of the public benchmarks: their files, where these come from, and under which terms.

What is special:
- names, addresses and MD5 digests are those that VLMEvalKit (commit e8e78f0) uses, so a folder of its users serves as it is;
- nothing here is fetched or opened: `locate` finds files on the disk, `download` brings them when it is asked to;
- rows and licenses that could not be checked against the files are None or end in "(unverified)".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minicpmv.errors import MiniCPMVError


OPENCOMPASS = "https://opencompass.openxlab.space/utils"
HUB = "https://huggingface.co"  # replaced by the environment's HF_ENDPOINT


class UnknownDataSetError(MiniCPMVError):
    """There is no data set of this name."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address; `path` is where it lies below the data set's folder."""

    path: str
    url: str
    md5: str | None = None


@dataclass(frozen=True)
class HubFiles:
    """All files of a data set repository on the Hub that match one of the patterns; sizes and digests are the Hub's."""

    repository: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class DataSet:
    """One data set.

    id: what suites and commands call it; name: what its files are called, as in VLMEvalKit.
    annotation: the file that holds the rows, below the data folder; found there, the data set counts as present.
    folder: of files other than a lone table, below the data folder; "" for a table that lies in the data folder itself.
    gate: what has to be done before the source hands the files out, or None.
    note: what the files lack, or what else is to be known before they are fetched.
    """

    id: str
    name: str
    annotation: str
    sources: tuple[RemoteFile | HubFiles, ...]
    license: str
    rows: int | None = None
    folder: str = ""
    gate: str | None = None
    note: str | None = None


def table(id: str, address: str, md5: str, license: str, rows: int | None = None, note: str | None = None) -> DataSet:
    """A data set that is one TSV with its images inside; `address` without a host is OpenCompass's."""
    url = address if address.startswith("https://") else f"{OPENCOMPASS}/{address}"
    file = url.rpartition("/")[2]
    return DataSet(id, file.removesuffix(".tsv"), file, (RemoteFile(file, url, md5),), license, rows, note=note)


NO_ANSWERS = "without answers: a run writes the file to upload"
APACHE, CC_BY_NC_SA, UNSTATED = "Apache-2.0", "CC-BY-NC-SA-4.0", "not stated with the file"
COCO = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"

DATA_SETS = {
    data_set.id: data_set
    for data_set in (
        table(
            "mmbench_dev_en", "benchmarks/MMBench/MMBench_DEV_EN_V11.tsv", "30c05be8f2f347a50be25aa067248184", APACHE
        ),
        table(
            "mmbench_dev_cn", "benchmarks/MMBench/MMBench_DEV_CN_V11.tsv", "593f9b5f6bea453d870a798b34ae4f37", APACHE
        ),
        table(
            "mmbench_test_en",
            "benchmarks/MMBench/MMBench_TEST_EN_V11.tsv",
            "8d1a704e791df6f5d9fb3ef782b65365",
            APACHE,
            note=NO_ANSWERS,
        ),
        table(
            "mmbench_test_cn",
            "benchmarks/MMBench/MMBench_TEST_CN_V11.tsv",
            "156e6569f9547afb16603eca16e85373",
            APACHE,
            note=NO_ANSWERS,
        ),
        table("mmstar", "VLMEval/MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e", UNSTATED, 1500),
        table("mmmu", "VLMEval/MMMU_DEV_VAL.tsv", "585e8ad75e73f75dcad265dfd0417d64", "Apache-2.0 (unverified)", 1050),
        table(
            "mathvista",
            "VLMEval/MathVista_MINI.tsv",
            "f199b98e178e5a2a20e7048f5dcb0464",
            "CC-BY-SA-4.0 (unverified)",
            1000,
        ),
        table("hallusionbench", "VLMEval/HallusionBench.tsv", "0c23ac0dc9ef46832d7a24504f2a0c7c", "BSD-3-Clause", 951),
        table("ai2d", "VLMEval/AI2D_TEST.tsv", "0f593e0d1c7df9a3d69bf1f947e71975", UNSTATED, 3088),
        table("ocrbench", "VLMEval/OCRBench.tsv", "e953d98a987cc6e26ef717b61260b778", UNSTATED, 1000),
        table("mmvet", "VLMEval/MMVet.tsv", "748aa6d4aa9d4de798306a63718455e3", UNSTATED, 218),
        table("mme", "VLMEval/MME.tsv", "b36b43c3f09801f5d368627fb92187c3", UNSTATED),
        table("realworldqa", "VLMEval/RealWorldQA.tsv", "4de008f55dc4fd008ca9e15321dc44b7", UNSTATED),
        table("mmtbench", "benchmarks/MMT-Bench/MMT-Bench_VAL.tsv", "8dd4b730f53dbf9c3aed90ca31c928e0", UNSTATED),
        table("chartqa", "VLMEval/ChartQA_TEST.tsv", "c902e0aa9be5582a7aad6dcf52734b42", "GPL-3.0 (unverified)", 2500),
        table("docvqa", "VLMEval/DocVQA_VAL.tsv", "d5ee77e1926ff10690d469c56b73eabf", UNSTATED, 5349),
        table(
            "textvqa", "VLMEval/TextVQA_VAL.tsv", "b233b31f551bbf4056f2f955da3a92cd", "CC-BY-4.0 (unverified)", 5000
        ),
        table(
            "ocrbench_v2",
            f"{HUB}/datasets/QYWH/ocrbench_v2/resolve/main/OCRBench_v2.tsv",
            "65d04fe07b4d4ee33e73fc8e7d4d46b0",
            UNSTATED,
            10000,
        ),
        table(
            "omnidocbench",
            f"{HUB}/datasets/ouyanglinke/OmniDocBench_tsv/resolve/main/OmniDocBench.tsv",
            "0fa5ccf31e682e219cb9ca83da741a59",
            UNSTATED,
            981,
        ),
        table(
            "refcoco",
            f"{HUB}/datasets/mjuicem/RefCOCO-VLMEvalKit/resolve/main/RefCOCO.tsv",
            "f50ca356638ddac89b309311fd876a5d",
            UNSTATED,
        ),
        DataSet(
            "videomme",
            "Video-MME",
            "videomme/test-00000-of-00001.parquet",
            (HubFiles("lmms-lab/Video-MME", ("videomme/*.parquet", "videos_chunked_*.zip", "subtitle.zip")),),
            "research only, not to be passed on",
            2700,
            folder="Video-MME",
        ),
        DataSet(
            "lvbench",
            "LVBench",
            "video_info.meta.jsonl",
            (HubFiles("zai-org/LVBench", ("video_info.meta.jsonl",)),),
            CC_BY_NC_SA,
            1549,
            folder="LVBench",
            note="its videos are on YouTube: put them into LVBench/videos as KEY.mp4",
        ),
        DataSet(
            "mlvu",
            "MLVU",
            "MLVU/json/1_plotQA.json",
            (HubFiles("MLVU/MVLU", ("MLVU/json/*.json", "MLVU/video/*")),),
            UNSTATED,
            2174,
            folder="MLVU",
            gate="accept the terms at huggingface.co/datasets/MLVU/MVLU, then `hf auth login`",
        ),
        DataSet(
            "longvideobench",
            "LongVideoBench",
            "lvb_val.json",
            (HubFiles("longvideobench/LongVideoBench", ("lvb_val.json", "subtitles.tar", "videos.tar.part.*")),),
            CC_BY_NC_SA,
            1337,
            folder="LongVideoBench",
            gate="accept the terms at huggingface.co/datasets/longvideobench/LongVideoBench, then `hf auth login`",
        ),
        DataSet(
            "motionbench",
            "MotionBench",
            "video_info.meta.jsonl",
            (HubFiles("zai-org/MotionBench", ("video_info.meta.jsonl", "*.mp4")),),
            CC_BY_NC_SA,
            8052,
            folder="MotionBench",
            note="about half of the answers are hidden (NA); the videos of MedVid, SportsSloMo and HA-ViD have to be "
            "fetched from their own pages",
        ),
        DataSet(
            "favorbench",
            "FAVOR-Bench",
            "video_perspective.json",
            (HubFiles("zl2048/FAVOR", ("video_perspective.json", "videos/FAVOR-Bench/*")),),
            CC_BY_NC_SA,
            8184,
            folder="FAVOR-Bench",
        ),
        DataSet(
            "mmhal",
            "MMHal-Bench",
            "response_template.json",
            (HubFiles("Shengcao1006/MMHal-Bench", ("response_template.json", "test_data.zip")),),
            APACHE,
            96,
            folder="MMHal-Bench",
        ),
        DataSet(
            "objhal",
            "Object-HalBench",
            "obj_halbench_300_with_image.jsonl",
            (RemoteFile("annotations_trainval2014.zip", COCO),),
            "COCO: CC-BY-4.0 (annotations)",
            300,
            folder="Object-HalBench",
            note="obj_halbench_300_with_image.jsonl is linked in the README of RLHF-V/RLAIF-V, behind a page that cannot "
            "be fetched: put it into Object-HalBench; this brings the objects and captions of COCO 2014",
        ),
    )
}


def squeezed(name: str) -> str:
    """A name without what people write differently: case, hyphens, underscores, dots, blanks."""
    return "".join(character for character in name.lower() if character.isalnum())


def find_data_set(name: str) -> DataSet:
    """The data set with this id or name; case, hyphens and underscores do not matter.

    Raises:
        UnknownDataSetError: names those that exist.
    """
    for data_set in DATA_SETS.values():
        if squeezed(name) in (squeezed(data_set.id), squeezed(data_set.name)):
            return data_set
    raise UnknownDataSetError(f"there is no data set {name!r}; there are {', '.join(DATA_SETS)}")


def other_file(data_set: DataSet, digest: str) -> str | None:
    """What to know about a file with this MD5: a word where published figures were made with another one."""
    known = [source.md5 for source in data_set.sources if isinstance(source, RemoteFile) and source.md5]
    if not known or digest in known:
        return None
    return (
        f"{data_set.annotation} is not the file that others measured with (its MD5 is {digest}, theirs {known[0]}): "
        "figures are comparable among runs on this file only"
    )


def hub_repositories(data_set: DataSet) -> Sequence[str]:
    return [source.repository for source in data_set.sources if isinstance(source, HubFiles)]
