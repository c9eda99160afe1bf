"""What holds the repository together: import names, the wheel, generated code, documents that must not go stale."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("coordinator", "edge_client", "emulator", "kernels", "protocols")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_five_folders_are_namespaces(folder: str) -> None:
    """A regular package `kernels` at the root would shadow Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / "py.typed").exists()


def test_the_wheel_holds_every_module_and_the_backbone(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel)
    names = set(packed.namelist())
    modules = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {f"farfield/{name}" for name in modules} <= names
    assert {f"farfield/{folder}/py.typed" for folder in FOLDERS} <= names
    assert {f"farfield/protocols/audit/page.{end}" for end in ("html.jinja", "css")} <= names
    assert not {name.split("/")[0] for name in names if not name.startswith("farfield")}
    weights = [packed.getinfo(name) for name in names if name.endswith(".safetensors")]
    assert [info.filename for info in weights] == ["farfield/emulator/builtin/tiny-llama-py/model.safetensors"]
    assert weights[0].file_size <= 9_000_000


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protocols").glob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "--proto_path=farfield/protocols=protocols"),
            *(f"--python_out={tmp_path}", f"--mypy_out=quiet:{tmp_path}"),
            *(f"farfield/protocols/{proto.name}" for proto in protos),
        ],
        cwd=ROOT,
        check=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    made = sorted((tmp_path / "farfield" / "protocols").iterdir())
    assert [path.name for path in made] == sorted(f"{p.stem}_pb2.{end}" for p in protos for end in ("py", "pyi"))
    for path in made:
        assert path.read_text() == (ROOT / "protocols" / path.name).read_text(), f"run `make protos`: {path.name}"


@pytest.mark.parametrize(
    "module",
    [
        "farfield.protocols.envelope",
        "farfield.coordinator.plans",
        "farfield.coordinator.cli",
        "farfield.coordinator.service",
        "farfield.edge_client.cli",
        "farfield.edge_client.resident",
    ],
)
def test_what_serves_and_waits_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
