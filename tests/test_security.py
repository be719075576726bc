"""What docs/security.md promises: nothing that is read is executed, ports are on loopback, credentials are not kept."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.config import MetricsConfig
from common.config_file import dump_config, load_config
from common.errors import UserError, without_secrets

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "actors", "learner")
OWN_PIPE = {("actors/reward_pool.py", "pickle.loads")}  # what this process has pickled itself, for its child


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def said(call: ast.Call, key: str) -> object:
    """The literal that a call gives for a keyword; None without."""
    found = [k.value for k in call.keywords if k.arg == key]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


Rule = Callable[[str, ast.Call], bool]
RULES: dict[str, Rule] = {
    "executes text": lambda name, _: (
        name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
    ),
    "asks a shell": lambda name, call: (
        name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
        or any(k.arg == "shell" for k in call.keywords)
    ),
    "reads a pickle": lambda name, _: (
        name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
        and name.split(".")[-1] in ("load", "loads", "Unpickler", "open")
    ),
    "torch.load of anything": lambda name, call: name == "torch.load" and said(call, "weights_only") is not True,
    "np.load of pickles": lambda name, call: name == "np.load" and said(call, "allow_pickle") is not False,
    "YAML that constructs": lambda name, _: name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    "code of a model": lambda name, call: (
        name.endswith(".from_pretrained") and said(call, "trust_remote_code") is not False
    ),
    "pickles of a model": lambda name, call: (
        name.startswith("AutoModel") and name.endswith(".from_pretrained") and said(call, "use_safetensors") is not True
    ),
}


def violations(source: str, file: str = "") -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (file, dotted(node.func)) not in OWN_PIPE:
            for rule, broken in RULES.items():
                if broken(dotted(node.func), node):
                    yield f"{file}:{node.lineno}: {dotted(node.func)}: {rule}"
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill", "cloudpickle"):
            yield f"{file}:{node.lineno}: from {node.module} import: name it where it is used"


def test_nothing_that_is_read_is_executed() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    found = [one for path in files for one in violations(path.read_text(), str(path.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *("eval('1')", "exec('1')", "__import__('x')", "os.system('ls')", "os.popen('ls')"),
        *("subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=flag)", "pickle.load(f)", "pickle.loads(b)"),
        *("torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)"),
        *("yaml.load(f, Loader=yaml.Loader)", "AutoConfig.from_pretrained(f)", "from pickle import loads"),
        "AutoModelForCausalLM.from_pretrained(f, trust_remote_code=False)",
    ],
)
def test_the_rules_see_what_they_are_for(source: str) -> None:
    assert list(violations(source))


def test_a_local_ray_and_the_metrics_listen_on_loopback_alone_and_ask_for_a_token() -> None:
    assert MetricsConfig().host == "127.0.0.1"
    code = """
import json, os, psutil, ray
from learner.ray_connection import LOCAL, connect
connect(LOCAL, way_out="")
@ray.remote(num_cpus=0)
def work():
    return os.getpid()
ray.get(work.remote())
me = psutil.Process()
ports = [c for p in [me, *me.children(recursive=True)] for c in p.net_connections("tcp") if c.status == "LISTEN"]
print(json.dumps({"addresses": sorted({c.laddr.ip for c in ports}), "auth": os.environ["RAY_AUTH_MODE"]}))
ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auth"] == "token"
    assert found["addresses"]
    assert set(found["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(
    ("uri", "hidden"),
    [
        ("s3://KEY:SESAME@bucket/x", "s3://***@bucket/x"),
        ("s3://KEY:SES/AME+SESAME@bucket/x", "s3://***@bucket/x"),
        ("abfs://a:SESAME@c/x?endpoint=y", "abfs://***@c/x?endpoint=y"),
        ("abfs://c@a/x?client_secret=SESAME&z=1", "abfs://c@a/x?client_secret=***&z=1"),
        ("'s3://KEY:SESAME@b' and http://u:SESAME@h", "'s3://***@b' and http://***@h"),
    ],
)
def test_credentials_are_neither_kept_nor_shown(uri: str, hidden: str) -> None:
    assert without_secrets(uri) == hidden
    for key in ("run.checkpoints", "run.root", "model.path", "run.ray_address"):
        with pytest.raises(UserError) as caught:
            load_config(None, ["task.name=sudoku", f'{key}="{uri}"'])
        assert "SESAME" not in str(caught.value)
        assert key in str(caught.value)
        assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a:b@c", "gs://anonymous@bucket/x", "abfs://container@account.dfs.core.windows.net/x", "a@b:c"]
)
def test_a_uri_without_credentials_is_kept(uri: str) -> None:
    assert without_secrets(uri) == uri
    assert uri in dump_config(load_config(None, ["task.name=sudoku", f'run.checkpoints="{uri}"']))
