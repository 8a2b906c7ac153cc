"""A classifier on 1, 2 and 8 CPU devices: `python -m tests.support.many_devices WEIGHTS FOLDER`; prints JSON."""

import contextlib
import io
import json
import re
import sys

import jax
import numpy as np

import dpn_jax
from dpn_jax.cli.main import main as dpn
from dpn_jax.images.folders import image_files


def main(weights: str, folder: str) -> None:
    """Prints, for each number of devices, what each way of running gives; and what their program exchanges."""
    jax.config.update("jax_num_cpu_devices", 8)
    files = image_files(folder)
    seen: dict[str, object] = {}
    for count in (1, 2, 8):
        classifier = dpn_jax.Classifier.from_pretrained(weights, devices=jax.devices()[:count], batch_size=20)
        assert len(classifier.devices) == count
        crops = np.stack([classifier.transform.crop(file) for file in files])
        program = classifier._pipeline.program
        text = program.jitted.lower(program.params, crops[: program.rows(20)]).compile().as_text()
        seen[f"logits {count}"] = classifier.logits(crops).tolist()
        seen[f"floats {count}"] = classifier.logits(classifier.transform.normalize(crops)).tolist()
        seen[f"stream {count}"] = list(classifier.stream(files, top_k=5))
        seen[f"collectives {count}"] = re.findall(r" (?:all-|reduce-scatter|collective-)[a-z-]*\(", text)
        for command in ("classify", "evaluate"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                words = [command, folder, "--weights", weights, "--devices", str(count), "--batch-size", "20"]
                assert dpn([*words, "--format", "json"]) == 0
            seen[f"{command} {count}"] = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(dpn_jax.Classifier.from_pretrained(weights, devices="all").devices) == 8
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
