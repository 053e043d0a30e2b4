"""Complete prompts.

    python generate.py out/demo_annealing --temperature 0 --max-new-tokens 30 --prompt \\
        "Quelle est la capitale de l'Espagne ? Madrid\\nQuelle est la capitale de la France ?"
    python generate.py hf:OpenLLM-France/Lucie-7B --quantize int4 --interactive
    python generate.py hf:FOLDER --prompt-file prompts.jsonl --json > completions.jsonl

The model is a run or checkpoint of ours, `hf:FOLDER_OR_NAME[@revision]`, or a folder that
--save-quantized has written. Without a prompt, standard input is one. A lone completion appears as
it is generated; several are computed together and appear in order.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import quantize
from checkpoint import CheckpointError
from completion import Completion, Sampling, add, check_prompt, complete, decode
from data.tokenizer import LucieTokenizer, Tokenizer, TokenizerError
from loading import open_model, peak_memory, tokenizer_for, use_device
from model import Lucie


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--tokenizer", help="ranks file, tokenizer.json or folder; default: the model's own"
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", help="\\n in it is a line break; repeatable")
    prompts.add_argument(
        "--prompt-file",
        action="append",
        help='UTF-8: the whole file is a prompt; of a .jsonl, the "prompt" of each line;\n'
        "- is standard input; repeatable",
    )
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-D ends")
    how = parser.add_argument_group("how tokens are drawn")
    how.add_argument("--max-new-tokens", type=int, default=200)
    how.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    how.add_argument("--top-k", type=int, default=0, help="0: all")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--seed", type=int, default=42)
    how.add_argument("--num-return-sequences", type=int, default=1, help="of each prompt")
    output = parser.add_argument_group("output")
    output.add_argument("--no-echo", action="store_true", help="without the prompt before the text")
    output.add_argument(
        "--json",
        action="store_true",
        help="a line of JSON for each completion: prompt, text, tokens, log-probabilities, why it\n"
        "ended",
    )
    where = parser.add_argument_group("the model in memory")
    where.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    where.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU, else float32; a folder of 4-bit weights has its own",
    )
    where.add_argument("--quantize", choices=("int4",), help="matrices in 4 bits")
    where.add_argument("--save-quantized", metavar="DIR", help="write those to a folder")
    where.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "num_return_sequences", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1")
    if args.save_quantized and not args.quantize:
        raise ValueError("--save-quantized needs --quantize int4")
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise ValueError("--interactive takes its prompts from you: no --prompt, no --json")
    if args.save_quantized:
        folder = Path(args.save_quantized)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder}: there is something of this name already")
    use_device(args.device)
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, in the order of the options. Raises ValueError naming what cannot be read."""
    prompts = [prompt.replace("\\n", "\n") for prompt in args.prompt or ()]
    files = args.prompt_file or ([] if prompts or args.save_quantized else ["-"])
    if not args.prompt_file and files and sys.stdin.isatty():
        raise ValueError("no prompt: --prompt, --prompt-file, --interactive, or text on the input")
    for file in files:
        text = _read_text(file)
        if not file.endswith(".jsonl"):
            prompts.append(text)
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                prompt = json.loads(line)["prompt"] if line.strip() else None
            except (ValueError, KeyError, TypeError):
                prompt = 0
            if isinstance(prompt, str):
                prompts.append(prompt)
            elif prompt is not None:
                raise ValueError(f'{file}, line {number}: a line is {{"prompt": "text"}}')
    return prompts


def _read_text(file: str) -> str:
    name = "standard input" if file == "-" else file
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start:,}") from None


def stream(
    model: Lucie,
    tokenizer: Tokenizer | LucieTokenizer,
    completion: Completion,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[str]:
    """Fill a completion, yielding its text as it grows."""

    def ids() -> Iterator[int]:
        prompts = [completion.prompt_ids]
        for tokens in decode(model, prompts, max_new_tokens, sampling, generator):
            add(completion, *tokens[0][1:])
            yield from completion.ids[count[0] :]
            count[0] = len(completion.ids)

    count = [0]
    for piece in tokenizer.stream(ids(), after=completion.prompt_ids):
        completion.text += piece
        yield piece


def talk(
    model: Lucie,
    tokenizer: Tokenizer | LucieTokenizer,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> None:
    """A prompt after the other, until the input ends; Ctrl-C ends a completion."""
    while True:
        try:
            prompt = input("> ").replace("\\n", "\n")
            completion = Completion(prompt, tokenizer.encode(prompt))
            check_prompt(model, prompt, completion.prompt_ids)
            for piece in stream(model, tokenizer, completion, max_new_tokens, sampling, generator):
                print(piece, end="", flush=True)
            print()
        except ValueError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def show(completion: Completion, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(asdict(completion), ensure_ascii=False), flush=True)
    else:
        print(("" if args.no_echo else completion.prompt) + completion.text, flush=True)


def main(argv: list[str]) -> None:
    args = parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    sampling.check(2**63)  # before minutes of loading; top_k against the vocabulary after that
    prompts = [] if args.interactive else read_prompts(args)
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty")
        if not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ValueError(f"not valid Unicode: the prompt {prompt[:60]!a}") from None

    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, source = open_model(args.model, args.device, dtype, args.quantize == "int4")
    tokenizer = tokenizer_for(model, args.tokenizer or source)
    sampling.check(model.config.vocab_size)
    if args.save_quantized:
        quantize.save(model, args.save_quantized, tokenizer)
        tqdm.write(f"{args.save_quantized} written", file=sys.stderr)

    generator = torch.Generator(args.device).manual_seed(args.seed)
    common = (args.max_new_tokens, sampling, generator)
    if args.interactive:
        talk(model, tokenizer, *common)
        return
    prompts = [prompt for prompt in prompts for _ in range(args.num_return_sequences)]
    if not prompts:
        return
    started = time.perf_counter()
    if len(prompts) == 1 and not args.json:
        completion = Completion(prompts[0], tokenizer.encode(prompts[0]))
        check_prompt(model, completion.prompt, completion.prompt_ids)
        print("" if args.no_echo else completion.prompt, end="", flush=True)
        for piece in stream(model, tokenizer, completion, *common):
            print(piece, end="", flush=True)
        print()
        completions = [completion]
    else:
        bar = sys.stderr.isatty()
        completions = complete(model, tokenizer, prompts, *common, args.batch_size, bar)
        for completion in completions:
            show(completion, args)
    report(completions, time.perf_counter() - started, model)


def report(completions: list[Completion], seconds: float, model: Lucie) -> None:
    """Speed and memory, as a line on stderr."""
    read = sum(len(completion.prompt_ids) for completion in completions)
    new = sum(len(completion.ids) for completion in completions)
    device = model.embed_tokens.weight.device
    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    print(
        f"{read:,} tokens read, {new:,} generated in {seconds:.1f} s ({new / seconds:,.1f} "
        f"tokens/s); weights {held / 1e9:.2f} GB, peak memory {peak_memory(device) / 1e9:.2f} GB",
        file=sys.stderr,
    )


def command_line(argv: list[str]) -> int:
    """main, with errors as one line; the exit code."""
    try:
        main(argv)
    except torch.OutOfMemoryError as error:
        print(f"generate.py: out of memory ({str(error).splitlines()[0]})", file=sys.stderr)
        return 2
    except (CheckpointError, TokenizerError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
