"""A continuation in text, with the earlier tokens that each new token's heads attended to most."""

from minitf.generate import Options, encode_prompt, generate
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer


def explain(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, num_shown: int = 3) -> str:
    """The continuation, and a table with the `num_shown` earlier tokens that got most weight for each new token.

    A token's share is its weight averaged over all layers and heads. The first token is left out unless it is the only
    one: heads that find nothing park their weight there (Xiao et al., 2023), which says nothing about it.
    """
    ids = encode_prompt(tokenizer, prompt)
    rows = []
    for step in generate(model, options.request(list(ids), with_weights=True)):
        assert step.weights_LBHS is not None
        shares_S = step.weights_LBHS[:, 0].float().mean(dim=(0, 1))
        first = len(ids) - len(shares_S)  # once the context was full, the cache starts later in the text
        if len(shares_S) > 1:
            shares_S[0] = 0
        top = shares_S.topk(min(num_shown, max(len(shares_S) - 1, 1)))
        pieces = tokenizer.pieces([ids[first + int(i)] for i in top.indices])
        shares = zip(pieces, top.values.tolist(), strict=True)
        looked_at = "  ".join(f"{piece.strip() or repr(piece)} {share:.0%}" for piece, share in shares)
        token = int(step.ids_B[0])
        rows.append((tokenizer.pieces([token])[0], looked_at))
        if token == tokenizer.end_id:
            break
        ids.append(token)
    text = tokenizer.decode(ids)
    width = max(len(piece) for piece, _ in rows)
    table = "\n".join(f"  {piece:<{width}}  looked at  {looked_at}" for piece, looked_at in rows)
    return f"{text}\n\n{table}"
