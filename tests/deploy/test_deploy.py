"""What can be said of deploy/ without a cloud: it parses, fits Ray's schema and our command line,
grants little and holds no secret."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from distmerge.cli.app import app
from distmerge.expressions.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
MANIFESTS = sorted(DEPLOY.glob("kuberay/*.yml"))
CLUSTERS = sorted(DEPLOY.glob("*/cluster.yml"))
POLICIES = sorted(DEPLOY.glob("aws/*-policy.json"))
README = (DEPLOY / "README.md").read_text()


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def documents(path: Path) -> dict[str, dict[str, Any]]:
    return {found["kind"]: found for found in yaml.safe_load_all(path.read_text())}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    return {pin.name: str(pin.specifier) for pin in map(Requirement, lines)}


def ray_cluster(path: Path) -> dict[str, Any]:
    found = documents(path)
    job = found.get("RayJob")
    return job["spec"]["rayClusterSpec"] if job else found["RayCluster"]["spec"]


def pod_specs(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def own_commands() -> Iterator[list[str]]:
    """What follows `distmerge`, wherever a document or manifest calls it."""
    for path in MANIFESTS:
        if job := documents(path).get("RayJob"):
            yield shlex.split(job["spec"]["entrypoint"])[1:]
    for line in readme_commands():
        words = shlex.split(line, comments=True)
        for word in words[:1] + words[3:]:  # itself, or what `ray exec CLUSTER` is given
            if word.startswith("distmerge "):
                yield shlex.split(word)[1:]
        if "distmerge" in words and words[:2] != ["docker", "build"] and words[0] != "gcloud":
            after = words[words.index("distmerge") + 1 :]
            if after and after[0] in ("merge", "plan", "verify", "clean"):
                yield after


def parsed(command: click.Command, words: list[str]) -> None:
    """Refuse words that a command line wouldn't take; nothing is run."""
    while isinstance(command, click.Group):
        context = click.Context(command)
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    command.make_context(command.name, list(words))


# typer brings its own copy of click, whose classes are others than click's.
def parsed_by_us(words: list[str]) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = group.commands[words[0]]
    return dict(found.make_context(words[0], list(words[1:])).params)


def test_each_walk_merges_on_ray_and_the_command_line_takes_it():
    taken = [(words[0], parsed_by_us(words)) for words in own_commands()]
    merges = [params for name, params in taken if name == "merge"]
    assert len(merges) == 4, "the job, the cluster that stays, AWS, Google's cloud"
    for params in merges:
        assert params["engine"] == "ray"
        assert params["address"] == "auto"
        assert params["out"].startswith("s3://")
    assert {name for name, _ in taken} >= {"merge", "plan", "verify"}


def test_what_the_readme_asks_of_ray_is_there():
    lines = [shlex.split(line) for line in readme_commands() if line.startswith("ray ")]
    # `ray job` comes with ray[default]; here its place in the command line is enough.
    lines = [line[: line.index(">")] if ">" in line else line for line in lines]
    assert {words[1] for words in lines} >= {"up", "exec", "rsync-up", "down", "get-auth-token"}
    for words in lines:
        if words[1] != "job":
            parsed(ray_cli, words[1:])


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"(?:file://|\s)(deploy/[\w./-]+)", README):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"^\| `([^|]+)` \|", README, re.MULTILINE):
        for pattern in name.split("`, `"):
            assert list(DEPLOY.glob(pattern)), pattern


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_recipes_in_manifests_are_recipes(path):
    maps = documents(path).get("ConfigMap")
    recipes = list(maps["data"].values()) if maps else []
    assert bool(recipes) == ("RayJob" in documents(path))
    for text in recipes:
        assert not load_recipe(text, strict=True).warnings
        assert text in README, "the manual shows another recipe"


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_launcher_configurations_fit_rays_schema(path):
    written = yaml.safe_load(path.read_text())
    prepared = prepare_config(written)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "worker"}
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_a_misspelt_key_would_be_seen(path):
    written = yaml.safe_load(path.read_text()) | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(written))


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_every_machine_is_given_its_role(path):
    cluster = yaml.safe_load(path.read_text())
    for name, kind in cluster["available_node_types"].items():
        node = kind["node_config"]
        if cluster["provider"]["type"] == "aws":
            assert node["IamInstanceProfile"] == {"Name": f"distmerge-{name}"}
            assert node["MetadataOptions"]["HttpTokens"] == "required"
        else:
            (account,) = node["serviceAccounts"]
            assert account["email"].startswith(f"distmerge-{name}@")


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_ray_listens_to_the_head_alone_and_starts_with_real_options(path):
    cluster = yaml.safe_load(path.read_text())
    for where in ("head", "worker"):
        starts = [c for c in cluster[f"{where}_start_ray_commands"] if c.startswith("ray start")]
        (start,) = starts
        parsed(ray_cli, shlex.split(start)[1:])
        assert ("--dashboard-host=127.0.0.1" in start) == (where == "head")


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_pods_run_as_nobody_special_with_a_token(path):
    cluster = ray_cluster(path)
    assert cluster["authOptions"] == {"mode": "token"}
    for spec in pod_specs(cluster):
        assert spec["securityContext"]["runAsNonRoot"] is True
        (container,) = spec["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_actors_fit_into_the_workers():
    """Ray keeps 30 % of a node's memory for its object store, which merges leave empty."""
    job = documents(DEPLOY / "kuberay/rayjob.yml")["RayJob"]
    params = parsed_by_us(shlex.split(job["spec"]["entrypoint"])[1:])
    assert params["allowed_mem"] == "2500MiB"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["memory"] == "32Gi"
    assert int(limits["cpu"]) * 2500 < 0.7 * 32 * 1024
    assert params["workers"] <= group["maxReplicas"] * int(limits["cpu"])


def test_the_image_is_pinned_and_not_root():
    text = (DEPLOY / "Dockerfile").read_text()
    pinned = pins(REPOSITORY / "constraints.txt")
    assert f"rayproject/ray:{pinned['ray'][2:]}-py311-cpu" in text
    assert f"torch{pinned['torch']}" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000"]
    assert "/whl/cpu\n" in text
    for path in MANIFESTS:
        assert ray_cluster(path)["rayVersion"] == pinned["ray"][2:]
    for copied in re.findall(r"^COPY \S+ (.*) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (REPOSITORY / name).exists(), name
            assert f"!{name}\n" in (DEPLOY / "Dockerfile.dockerignore").read_text()


def test_the_images_pins_add_to_the_projects_and_fit_together():
    ours, more = pins(REPOSITORY / "constraints.txt"), pins(DEPLOY / "constraints.txt")
    assert not set(ours) & set(more)
    assert ours["boto3"] == ours["botocore"], "they are released together"
    assert {"gcsfs", "google-api-python-client", "google-auth-httplib2"} <= set(more)


@pytest.mark.parametrize("path", POLICIES, ids=named)
def test_policies_name_actions_and_places(path):
    read_only = re.compile(r"ec2:Describe\w+|ecr:GetAuthorizationToken")
    for statement in json.loads(path.read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        if "*" in statement["Resource"]:  # these can't be narrowed
            assert all(read_only.fullmatch(action) for action in statement["Action"])


def test_inputs_are_only_read():
    statements = json.loads((DEPLOY / "aws/storage-policy.json").read_text())["Statement"]
    granted = {
        action
        for statement in statements
        for action in statement["Action"]
        if any("YOUR-MODELS" in place for place in statement["Resource"])
    }
    assert granted == {"s3:GetObject", "s3:GetObjectVersion", "s3:ListBucket"}
    reader = yaml.safe_load((DEPLOY / "gcp/reader-role.yml").read_text())
    assert reader["includedPermissions"] == ["storage.objects.get", "storage.objects.list"]


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("gcp/*-role.yml")), ids=named)
def test_roles_name_permissions(path):
    role = yaml.safe_load(path.read_text())
    assert role["stage"] == "GA"
    for permission in role["includedPermissions"]:
        assert re.fullmatch(r"(storage|compute)(\.[a-zA-Z]+){2}", permission)


SECRET = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{16}|\bhf_\w{20,}|AIza[\w-]{30,}|-----BEGIN|"
    r"(?i:secret_?access_?key|password|token|private_?key)['\"]?\s*[=:]\s*['\"]?[A-Za-z0-9+/]{16,}"
)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_here_is_a_secret(path):
    assert not SECRET.search(path.read_text())


def test_the_pattern_knows_secrets():
    for text in ("AKIA" + "A" * 16, "hf_" + "a" * 30, "AWS_SECRET_ACCESS_KEY=" + "a1" * 20):
        assert SECRET.search(text)


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_secrets_come_by_reference(path):
    for spec in pod_specs(ray_cluster(path)):
        (container,) = spec["containers"]
        for variable in container["env"]:
            assert "value" not in variable
            assert "secretKeyRef" in variable["valueFrom"]
        assert all("secretRef" in source for source in container["envFrom"])
    assert "Secret" not in documents(path)
