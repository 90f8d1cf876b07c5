"""Runs in mergekit's environment, where nothing of ours is: one process for many recipes.

    python drive_mergekit.py JOBS.json ANSWERS.json

JOBS: [{"recipe": YAML, "out": folder, "seed": number or null}, ...]. ANSWERS: for each, in order,
null or what mergekit raised.
"""

import json
import sys

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main(jobs, answers):
    torch.set_num_threads(1)
    with open(jobs) as file:
        given = json.load(file)
    told = []
    for job in given:
        try:
            recipe = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
            options = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=job["seed"])
            run_merge(recipe, job["out"], options)
            told.append(None)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    with open(answers, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
