"""How a generated file reads its weights, keeps keys and values, and writes text.

Names in the files come from the family's table, as data; the code around them is the same for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from pellucid.families import Entry, family_of, table
from pellucid.models import Config, empty_model
from pellucid.names import general

_COUNT = 64  # tokens that a file writes when it is run
_CACHE = '''
class LayerCache:
    """Keys and values of one layer so far, (B, {kv_heads}, S, {head_dim}) each."""

    kv: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add those of this pass; return all."""
        self.kv = tuple(torch.cat(pair, dim=2) for pair in zip(self.kv, new, strict=False)) or new
        return self.kv


class Cache:
    """A `LayerCache` for each layer."""

    def __init__(self) -> None:
        self.layers = [LayerCache() for _ in range({layers})]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].kv[0].shape[2] if self.layers[0].kv else 0
'''
_LOAD = '''
def load(folder: Path, dtype: torch.dtype | None = None) -> Decoder:
    """The model with the weights of a folder, in the dtype they are stored in or another."""
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    files = set(listed.values()) or {"model.safetensors"}
    stored = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    with torch.device("meta"):
        model = Decoder()
    dtype = dtype or stored["EMBEDDING"].dtype
    weights = {}
    for name in model.state_dict():
        number = "".join(filter(str.isdigit, name))  # of the layer, if it is in one
PARAMETER
    model.load_state_dict(weights, assign=True)
    return model.eval()
'''
_GENERATE = '''

@torch.inference_mode()
def generate(model: Decoder, tokens: list[int], count: int, stop: set[int]) -> Iterator[int]:
    """The likeliest next token, up to `count` times, until one of `stop`."""
    cache = Cache()
    new = torch.tensor([tokens])
    for _ in range(min(count, {context} - len(tokens))):
        token = int(model(new, cache)[0, -1].argmax())
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]])


def main() -> None:
    """Print how a prompt goes on: text, or token ids where there is no tokenizer.json."""
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    stated = folder / "generation_config.json"
    stated = stated if stated.exists() else folder / "config.json"
    ends = json.loads(stated.read_text()).get("eos_token_id")
    model, stop = load(folder), set(ends) if isinstance(ends, list) else {{ends}}
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = tokenizer.encode(prompt).ids
        about = json.loads((folder / "tokenizer_config.json").read_text())
        begin = [tokenizer.token_to_id(str(about.get("bos_token")))]
        tokens = tokens if tokens[:1] == begin or not about.get("add_bos_token") else begin + tokens
        print(prompt + tokenizer.decode(list(generate(model, tokens, {count}, stop))))
    else:
        print(prompt, *generate(model, [int(word) for word in prompt.split()], {count}, stop))


if __name__ == "__main__":
    main()
'''


def cache_text(config: Config) -> str:
    """The KV cache."""
    return _CACHE.format(
        kv_heads=config.n_kv_heads, head_dim=config.head_dim, layers=config.n_layers
    )


def generating_text(config: Config) -> str:
    """Greedy text, and what runs when the file is run."""
    return _GENERATE.format(context=config.context_length, count=_COUNT)


def loading_text(config: Config, spelt: Callable[[str], str], kinds: list[str]) -> str:
    """The table of names, `load`, and from stored tensors to parameters.

    spelt  from a name of the family's table to what the files at hand call it
    kinds  of the layers, where the text has them
    """
    entries = [entry for entry in table(config) if entry.parameters]
    names: dict[str, str] = {}
    rows: dict[str, tuple[int, int]] = {}
    shapes = {name: each.shape for name, each in empty_model(config).state_dict().items()}
    for entry in entries:
        begin = 0
        for name in entry.parameters:
            module, theirs = _module(name), _module(spelt(entry.stored))
            theirs = theirs if entry.head is None else theirs.rpartition(".")[0]
            names.setdefault(general(module), _numberless(theirs))
            end = begin + shapes[name][0]
            if len(entry.parameters) > 1:
                rows[general(module)] = (begin, end)
            begin = end
    prefix = family_of(config.family, "config").names.prefix
    prefix = spelt(f"{prefix}norm").removesuffix("norm")
    names = {ours: theirs for ours, theirs in names.items() if theirs != f"{prefix}{ours}"}
    lines = ["", "NAMES = {  # what the files call otherwise; N is the number of a layer"]
    lines += [f'    "{ours}": "{theirs}",' for ours, theirs in names.items()]
    lines += ["}"]
    if rows:
        lines += ["ROWS = {  # of a stored tensor that holds several, one below the other"]
        lines += [f'    "{ours}": {place},' for ours, place in rows.items()] + ["}"]
    embedding = f"{names.get('embed', prefix + 'embed')}.weight"
    code = "\n".join(_parameter(config, entries, bool(rows), kinds, prefix))
    lines += ["", _LOAD.replace("EMBEDDING", embedding).replace("PARAMETER", code).rstrip()]
    ordered = next((entry for entry in entries if entry.order is not None), None)
    return "\n".join((*lines, *(_halves(config, ordered) if ordered else ())))


def _parameter(
    config: Config, entries: list[Entry], joined: bool, kinds: list[str], prefix: str
) -> Iterator[str]:
    """From the stored tensors to one parameter, inside the loop over all."""
    ordered = [entry for entry in entries if entry.order is not None]
    yield '        module, _, part = name.replace(f".{number}.", ".N.").rpartition(".")'
    if not all(_has_part(name) for entry in entries for name in entry.parameters):
        yield '        if part not in ("weight", "bias"):'
        yield '            module, part = f"{module}.{part}", ""'
        name = f'NAMES.get(module, f"{prefix}{{module}}")'
        yield f'        theirs = ({name} + f".{{part}}").rstrip(".")'
    else:
        apart = any(entry.head is not None for entry in entries)
        after = "" if apart else ' + f".{part}"'
        yield f'        theirs = NAMES.get(module, f"{prefix}{{module}}"){after}'
    of_heads = next((entry for entry in entries if entry.heads), None)
    if of_heads is None or of_heads.head is None:
        yield '        tensor = stored[theirs.replace(".N.", f".{number}.")]'
    else:
        yield '        theirs = theirs.replace(".N.", f".{number}.")'
        yield '        if module.endswith(("q_norm", "k_norm")):  # a tensor for each head'
        yield '            heads = range(sum(each.startswith(f"{theirs}.") for each in stored))'
        cat = 'torch.cat([stored[f"{theirs}.{head}.weight"] for head in heads])'
        yield f"            tensor = {cat}"
        yield "        else:"
        yield '            tensor = stored[f"{theirs}.{part}"]'
    if of_heads is not None and of_heads.head is None:
        yield '        if module.endswith(("q_norm", "k_norm")):'
        yield "            tensor = tensor.flatten()  # the files hold (heads, D)"
    if any(entry.transposed for entry in entries):
        yield '        if part == "weight" and module.endswith("_proj"):'
        yield "            tensor = tensor.t()  # the files hold (in, out)"
    if joined:
        yield "        if module in ROWS:"
        yield "            tensor = tensor[slice(*ROWS[module])]"
    if ordered:
        yield from _reordered(config, ordered, kinds)
    yield "        weights[name] = tensor.to(dtype)"


def _reordered(config: Config, ordered: list[Entry], kinds: list[str]) -> Iterator[str]:
    leaves = dict.fromkeys(_module(entry.parameters[0]).split(".")[-1] for entry in ordered)
    layers = {int(entry.parameters[0].split(".")[1]) for entry in ordered}
    test = f"module.endswith({_tuple(leaves)})"
    if len(layers) < config.n_layers:
        turned = {kinds[layer] for layer in layers}
        test += f" and KINDS[int(number)] in {_tuple(turned)}"
    yield f"        if {test}:"
    yield "            tensor = halves(tensor)"


def _halves(config: Config, entry: Entry) -> Iterator[str]:
    order = entry.order
    assert order is not None, "rows in an order of their own"
    half, turned = order.turned // 2, order.turned
    rest = f", heads[:, {turned}:]" if turned < order.head_dim else ""
    yield ""
    yield ""
    yield "def halves(rows: Tensor) -> Tensor:"
    if order.pairs == "neighbours":
        said, first, second = "2i and 2i + 1", f"heads[:, 0:{turned}:2]", f"heads[:, 1:{turned}:2]"
        yield f'    """Rows of each head with pair i at i and i + {half}; the files have {said}."""'
    else:
        first, second = f"heads[:, {half}:{turned}]", f"heads[:, :{half}]"
        yield '    """Rows of each head as RoPE turns them here; the files turn the other way."""'
    yield f"    heads = rows.unflatten(0, (-1, {order.head_dim}))"
    yield f"    return torch.cat(({first}, {second}{rest}), dim=1).flatten(0, 1)"


def _tuple(words: Iterable[str]) -> str:
    quoted = [f'"{word}"' for word in sorted(words)]
    return f"({', '.join(quoted)}{',' if len(quoted) == 1 else ''})"


def _has_part(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _module(name: str) -> str:
    return name.rpartition(".")[0] if _has_part(name) else name


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name, count=1)
