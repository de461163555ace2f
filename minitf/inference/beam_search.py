"""Beam search: the likeliest whole answer among those whose prefixes stayed among the `width` likeliest."""

import torch
from torch import Tensor

from minitf.inference.decoder import Decoder

Scored = tuple[float, list[int]]  # score and ids of an answer


@torch.no_grad()
def beam_search(
    decoder: Decoder, logits_RV: Tensor, end_id: int, width: int, max_tokens: int, length_penalty: float
) -> list[list[int]]:
    """The best answer found for each text, as ids without the end.

    `decoder` holds `width` rows R of every text, `logits_RV` scores the next token of each. Answers, their ends
    included, are compared by `sum of log probabilities / number of tokens ** length_penalty`. A text is done once none
    of its beams, at their present length, can beat the worst of `width` finished answers.
    """
    num_texts, vocab_size = logits_RV.shape[0] // width, logits_RV.shape[1]
    device = logits_RV.device
    sums_NW = torch.full((num_texts, width), -torch.inf, device=device)
    sums_NW[:, 0] = 0.0  # the rows of a text start equal: only the first may branch
    beams: list[list[list[int]]] = [[[] for _ in range(width)] for _ in range(num_texts)]
    finished: list[list[Scored]] = [[] for _ in range(num_texts)]
    open_texts = set(range(num_texts))
    for length in range(1, max_tokens + 1):
        values_NC, places_NC = _best(decoder, logits_RV, sums_NW)
        rows, ids = [], []
        for text, (values, places) in enumerate(zip(values_NC.tolist(), places_NC.tolist(), strict=True)):
            alive: list[tuple[float, int, int]] = []  # sum, beam it extends, id it adds
            for rank, (value, place) in enumerate(zip(values, places, strict=True)):
                beam, id_ = divmod(place, vocab_size)
                if id_ == end_id or length == max_tokens:
                    if text in open_texts and rank < width and value > -torch.inf:
                        answer = beams[text][beam] + ([] if id_ == end_id else [id_])
                        finished[text].append((value / length**length_penalty, answer))
                elif len(alive) < width:
                    alive.append((value, beam, id_))
            alive += [(-torch.inf, 0, end_id)] * (width - len(alive))
            beams[text] = [[*beams[text][beam], id_] for _, beam, id_ in alive]
            rows += [text * width + beam for _, beam, _ in alive]
            ids += [id_ for _, _, id_ in alive]
            sums_NW[text] = torch.tensor([value for value, _, _ in alive], device=device)
            finished[text] = sorted(finished[text], key=lambda item: -item[0])[:width]
            if len(finished[text]) == width and alive[0][0] / length**length_penalty <= finished[text][-1][0]:
                open_texts.discard(text)
        if not open_texts or length == max_tokens:
            break
        decoder.reorder(torch.tensor(rows, device=device))
        logits_RV = decoder.decode(torch.tensor(ids, device=device))
    return [max(found, key=lambda item: item[0])[1] if found else [] for found in finished]


def _best(decoder: Decoder, logits_RV: Tensor, sums_NW: Tensor) -> tuple[Tensor, Tensor]:
    """The best extensions of each text's beams: their sums, and `beam * V + id`.

    They are twice the width: even if each beam's likeliest token is the end, `width` beams remain to extend.
    """
    num_texts, width = sums_NW.shape
    with decoder.single_thread():
        log_p_NWV = logits_RV.log_softmax(-1).view(num_texts, width, -1)
        totals_NC = (sums_NW[:, :, None] + log_p_NWV).flatten(1)
        return tuple(totals_NC.topk(min(2 * width, totals_NC.shape[1]), dim=1))  # type: ignore[return-value]
