"""Tools are found or built once; what goes wrong says what to try next. `go` is a script here."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.waiting import wait_for

from tokenfactory.twin import gobuild, toolchain, workshop
from tokenfactory.twin.workshop import CONTROL_PLANE, ToolError

# Logs its calls; builds what it is told to; `trouble`, where it exists, is run instead of building.
FAKE_GO = """#!/bin/sh
here={here}
if [ "$1 $2" = "env GOVERSION" ]; then cat $here/version; exit; fi
echo "$*" >> $here/calls
if [ -e $here/trouble ]; then . $here/trouble; fi
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2; shift ;;
    *@*) name=${{1%@*}}; out=$GOBIN/${{name##*/}} ;;
  esac
  shift
done
printf '#!/bin/sh\\necho built\\n' > $out
chmod +x $out
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An empty cache and a PATH with nothing but a shell, its helpers and a Go that can be told to fail."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sh", "cat", "chmod", "touch", "sleep"):
        found = next(Path(folder, name) for folder in ("/bin", "/usr/bin") if Path(folder, name).exists())
        (path / name).symlink_to(found)
    put(path / "go", FAKE_GO.format(here=tmp_path))
    (tmp_path / "version").write_text("go1.26.8\n")
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    said: list[str] = []

    def calls() -> list[str]:
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return SimpleNamespace(
        path=path,
        folder=tmp_path,
        cache=tmp_path / "cache" / "tokenfactory",
        said=said,
        calls=calls,
        go_is=lambda version: (tmp_path / "version").write_text(version + "\n"),
        trouble=lambda script: (tmp_path / "trouble").write_text(script + "\n"),
    )


def put(program: Path, script: str) -> None:
    program.write_text(script)
    program.chmod(0o755)


def folders(machine: SimpleNamespace) -> list[str]:
    return sorted(path.name for path in machine.cache.iterdir() if path.is_dir())


def test_the_control_plane_is_built_once_and_says_how_long_it_takes(machine: SimpleNamespace):
    built = toolchain.ensure_control_plane(machine.said.append)
    assert toolchain.ensure_control_plane(machine.said.append) == built

    assert len(machine.calls()) == 1
    assert f"gitVersion={toolchain.kubernetes_version()}" in machine.calls()[0]
    assert "about 6 minutes on 2 cores" in machine.said[0]
    assert len(machine.said) == 2
    for name in (*CONTROL_PLANE, "kubelet"):
        assert subprocess.run([built / name], capture_output=True, check=True).stdout == b"built\n"


def test_a_long_build_says_that_it_goes_on(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    heard = machine.folder / "heard"
    machine.trouble(f"until [ -e {heard} ]; do sleep 0.01; done")
    monkeypatch.setattr(gobuild, "_STILL_SECONDS", 0.05)

    def say(line: str) -> None:
        if line.startswith("  still building the control plane: "):
            heard.touch()

    assert (toolchain.ensure_control_plane(say) / "controlplane").exists()


@pytest.mark.parametrize("file", ["go.mod", "go.sum", "main.go"])
def test_another_source_is_another_build(
    file: str, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    first = toolchain.ensure_control_plane(machine.said.append)
    copy = machine.folder / "tools"
    (copy / "controlplane").mkdir(parents=True)
    source = workshop.tools_folder()
    for name in ("versions.toml", "controlplane/go.mod", "controlplane/go.sum", "controlplane/main.go"):
        (copy / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr(toolchain, "tools_folder", lambda: copy)
    assert toolchain.ensure_control_plane(machine.said.append) == first

    with (copy / "controlplane" / file).open("a") as changed:
        changed.write("\n")
    assert toolchain.ensure_control_plane(machine.said.append) != first


def test_another_go_is_another_build(machine: SimpleNamespace):
    first = toolchain.ensure_control_plane(machine.said.append)
    machine.go_is("go1.26.9")
    assert toolchain.ensure_control_plane(machine.said.append) != first


def test_what_is_built_needs_no_go_any_more(machine: SimpleNamespace):
    built = toolchain.ensure_control_plane(machine.said.append)
    (machine.path / "go").unlink()
    assert toolchain.ensure_control_plane(machine.said.append) == built


def remove_go(machine: SimpleNamespace) -> None:
    (machine.path / "go").unlink()


WRONG: dict[str, tuple[Callable[[SimpleNamespace], object], list[str]]] = {
    "no go": (
        remove_go,
        ["Go is not on PATH", "install it from https://go.dev/dl/#go1.26.8", "KUBEBUILDER_ASSETS"],
    ),
    "too new": (
        lambda m: m.go_is("go1.27.2"),
        ["is go1.27.2", "`kubectl apply` fails", "GOTOOLCHAIN=go1.26.8"],
    ),
    "too old": (lambda m: m.go_is("go1.25.1"), ["is go1.25.1", "only Go 1.26", "GOTOOLCHAIN=go1.26.8"]),
    "like it, but not it": (lambda m: m.go_is("go1.260"), ["is go1.260", "only Go 1.26"]),
    "full disk": (
        lambda m: m.trouble("echo 'write /x/y.a: no space left on device'; exit 1"),
        ["the disk is full", "XDG_CACHE_HOME and GOCACHE", "what was built so far is kept"],
    ),
    "no network": (
        lambda m: m.trouble(
            "echo 'go: k8s.io/api@v0.36.3: Get: dial tcp: lookup proxy: no such host'; exit 1"
        ),
        ["dial tcp", "check the network and `go env GOPROXY`"],
    ),
    "out of memory": (lambda m: m.trouble("echo 'compile: signal: killed'; exit 1"), ["GOFLAGS=-p=1"]),
    "does not compile": (
        lambda m: m.trouble("echo './main.go:9:1: syntax error'; exit 2"),
        ["building the control plane with go1.26.8 failed", "main.go:9:1: syntax error", "try again"],
    ),
    "broken go": (
        lambda m: put(m.path / "go", "#!/bin/sh\necho no GOROOT >&2; exit 2\n"),
        ["go env GOVERSION` failed: no GOROOT"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_said_with_the_next_thing_to_try(case: str, machine: SimpleNamespace):
    break_it, words = WRONG[case]
    break_it(machine)
    with pytest.raises(ToolError) as raised:
        toolchain.ensure_control_plane(machine.said.append)
    for word in words:
        assert word in str(raised.value)
    assert not [name for name in folders(machine) if name.startswith("controlplane")], (
        "nothing half built stays"
    )


def test_a_disk_that_is_full_before_is_not_built_on(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workshop.shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    with pytest.raises(ToolError, match="the disk is full"):
        toolchain.ensure_control_plane(machine.said.append)
    assert machine.calls() == []


def test_a_cache_that_cannot_be_made_names_the_setting(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    (machine.folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.folder / "file"))
    with pytest.raises(ToolError, match="set XDG_CACHE_HOME to a folder that you may write"):
        toolchain.ensure_control_plane(machine.said.append)


def builder(machine: SimpleNamespace) -> subprocess.Popen[str]:
    # Whoever runs the tests in the background may have told us to ignore Ctrl-C; a person at a terminal has not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tokenfactory.twin import toolchain; print(toolchain.ensure_control_plane())"
    )
    environment = {**os.environ, "PYTHONPATH": "operator"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_at_once_build_once(machine: SimpleNamespace):
    machine.trouble(f"while [ ! -e {machine.folder}/go-on ]; do sleep 0.02; done")
    first = builder(machine)
    wait_for(machine.calls, "the first build runs")
    second = builder(machine)
    assert second.stderr is not None
    assert "another process is building it; waiting" in second.stderr.readline()
    (machine.folder / "go-on").touch()

    answers = {process.communicate()[0] for process in (first, second)}
    assert len(answers) == 1
    assert first.returncode == second.returncode == 0
    assert len(machine.calls()) == 1


def test_a_killed_build_leaves_no_second_one_beside_it_and_is_begun_again(machine: SimpleNamespace):
    # The first `go` outlives whoever started it; it holds the lock until it is done.
    machine.trouble(f"while [ ! -e {machine.folder}/go-on ]; do sleep 0.02; done")
    first = builder(machine)
    wait_for(machine.calls, "the first build runs")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert any(".partial-" in name for name in folders(machine))

    second = builder(machine)
    assert second.stderr is not None
    assert "another process is building it; waiting" in second.stderr.readline()
    (machine.folder / "go-on").touch()
    built, _ = second.communicate()

    assert Path(built.strip(), "etcd").exists()
    assert len(machine.calls()) == 2
    assert not any(".partial-" in name for name in folders(machine)), "what the killed build left is swept"


def test_ctrl_c_leaves_nothing_half_built(machine: SimpleNamespace):
    machine.trouble("while :; do sleep 0.02; done")
    process = builder(machine)
    wait_for(machine.calls, "the build runs")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert not [name for name in folders(machine) if name.startswith("controlplane")]


def assets(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        put(folder / name, "#!/bin/sh\n")
    return folder


def test_kubebuilder_assets_are_used_when_they_hold_everything(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    folder = assets(machine.folder / "assets", CONTROL_PLANE)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
    assert toolchain.ensure_control_plane(machine.said.append) == folder
    assert machine.calls() == []


def test_kubebuilder_assets_that_lack_something_are_not_mixed(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    folder = assets(machine.folder / "assets", ("etcd", "kube-apiserver", "kubectl"))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
    built = toolchain.ensure_control_plane(machine.said.append)
    assert built.parent == machine.cache
    assert "lacks kube-controller-manager, kube-scheduler: using the embedded" in machine.said[0]


@pytest.mark.parametrize(
    ("ensure", "name", "fits", "does_not"),
    [
        (toolchain.ensure_helm, "helm", "v4.0.1", "v3.19.0"),
        (toolchain.ensure_kubeconform, "kubeconform", "v0.7.0", "Development"),
    ],
    ids=["helm", "kubeconform"],
)
def test_a_tool_on_path_is_used_only_in_a_fitting_version(
    ensure: Callable[..., Path], name: str, fits: str, does_not: str, machine: SimpleNamespace
):
    put(machine.path / name, f"#!/bin/sh\necho {fits}\n")
    assert ensure(machine.said.append) == machine.path / name
    assert machine.calls() == []

    put(machine.path / name, f"#!/bin/sh\necho {does_not}\n")
    built = ensure(machine.said.append)
    assert ensure(machine.said.append) == built
    assert built.parent.parent == machine.cache
    pinned = workshop.pins()[name]
    assert machine.calls() == [f"install {pinned['package']}@{pinned['version']}"]


def test_promtool_comes_from_path_first(machine: SimpleNamespace):
    put(machine.path / "promtool", "#!/bin/sh\n")
    assert toolchain.ensure_promtool(machine.said.append) == machine.path / "promtool"


def test_without_promtool_and_debian_the_error_says_where_it_is_to_be_had(machine: SimpleNamespace):
    with pytest.raises(ToolError, match=r"promtool is not on PATH .*https://prometheus.io/download/"):
        toolchain.ensure_promtool(machine.said.append)


def test_promtool_is_unpacked_from_debians_package_without_installing_it(machine: SimpleNamespace):
    put(machine.path / "apt-get", '#!/bin/sh\n[ "$1" = download ] && touch prometheus_2.deb\n')
    unpack = "#!/bin/sh\n/bin/mkdir -p usr/bin && touch usr/bin/promtool\n"
    put(machine.path / "dpkg-deb", unpack)
    promtool = toolchain.ensure_promtool(machine.said.append)
    assert promtool.is_relative_to(machine.cache)
    assert "unpacking Debian's package prometheus" in machine.said[0]
    put(machine.path / "apt-get", "#!/bin/sh\nexit 1\n")
    assert toolchain.ensure_promtool(machine.said.append) == promtool


def test_debians_package_that_cannot_be_fetched_says_so(machine: SimpleNamespace):
    put(machine.path / "apt-get", "#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    put(machine.path / "dpkg-deb", "#!/bin/sh\n")
    with pytest.raises(ToolError, match="Unable to locate package\nrun `apt-get update` as root"):
        toolchain.ensure_promtool(machine.said.append)


def test_the_controller_of_groups_comes_with_what_it_is_installed_with(machine):
    config = machine.folder / "module" / "config"
    for part in ("crd/bases", "webhook"):
        (config / part).mkdir(parents=True)
        (config / part / "one.yaml").write_text("kind: One\n")
    machine.trouble(f'case "$1" in list) echo {config.parent}; exit ;; esac')

    found = toolchain.ensure_lws(machine.said.append)

    assert {str(path.relative_to(found)) for path in found.rglob("*.*")} == {
        "crd/one.yaml",
        "webhook/one.yaml",
    }
    assert os.access(found / "lws", os.X_OK)
    assert toolchain.ensure_lws(machine.said.append) == found
    assert len([call for call in machine.calls() if call.startswith("build")]) == 1


def test_a_module_that_cannot_be_found_is_no_controller_of_groups(machine):
    machine.trouble('case "$1" in list) echo "no such module" >&2; exit 1 ;; esac')

    with pytest.raises(ToolError, match="no such module"):
        toolchain.ensure_lws(machine.said.append)

    assert not [name for name in folders(machine) if name.startswith("lws")]
