"""What COCO's annotations say an image holds."""

import json

from minicpmv.evaluate.scoring.coco_annotations import ANNOTATION_FILES, objects_of_image


def test_instances_and_captions_of_both_parts_say_together_what_an_image_holds(tmp_path):
    categories = [{"id": 7, "name": "kite"}, {"id": 8, "name": "wine glass"}]
    parts = {
        "captions_train2014.json": {"annotations": [{"image_id": 1, "caption": "Two women on a bench."}]},
        "captions_val2014.json": {"annotations": [{"image_id": 2, "caption": "A puppy."}]},
        "instances_train2014.json": {
            "annotations": [{"image_id": 1, "category_id": 8}, {"image_id": 1, "category_id": 8}],
            "categories": categories,
        },
        "instances_val2014.json": {"annotations": [{"image_id": 2, "category_id": 7}], "categories": categories},
    }
    for name, part in parts.items():
        (tmp_path / name).write_text(json.dumps(part))
    files = [tmp_path / name for name in ANNOTATION_FILES]
    assert objects_of_image(files, 1) == ["bench", "person", "wine glass"]
    assert objects_of_image(files, 2) == ["dog", "kite"]
    assert objects_of_image(files, 3) == []
