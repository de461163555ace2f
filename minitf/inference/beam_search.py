"""Beam search: the likeliest whole answer among those whose beginnings were among the likeliest all along."""

import torch
from torch import Tensor

from minitf.inference.decoder import Decoder


@torch.no_grad()
def beam_search(
    decoder: Decoder, logits_RV: Tensor, end_id: int, width: int, max_tokens: int, length_penalty: float
) -> list[list[int]]:
    """The best answer found for each text, as ids without the end.

    `decoder` holds `width` rows of every text, `logits_RV` scores what comes next in each. Answers, their end included,
    are compared by `sum of log probabilities / number of tokens ** length_penalty`. A text is done once none of its
    beams, at the length it has, can beat the worst of `width` finished answers.
    """
    num_texts = logits_RV.shape[0] // width
    device = logits_RV.device
    sums_NW = torch.full((num_texts, width), -torch.inf, device=device)
    sums_NW[:, 0] = 0.0  # all rows of a text are alike at first
    beams: list[list[list[int]]] = [[[] for _ in range(width)] for _ in range(num_texts)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(num_texts)]
    open_texts = set(range(num_texts))
    for length in range(1, max_tokens + 1):
        with decoder.sparing_cores():
            log_p_NWV = logits_RV.log_softmax(-1).view(num_texts, width, -1)
            totals_NC = (sums_NW[:, :, None] + log_p_NWV).flatten(1)
            # Twice the width: were every beam's likeliest token the end, as many others would remain to go on with.
            best = totals_NC.topk(min(2 * width, totals_NC.shape[1]), dim=1)
        vocab_size = log_p_NWV.shape[-1]
        rows, ids = [], []
        for text, (values, places) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            going: list[tuple[float, int, int]] = []
            for rank, (value, place) in enumerate(zip(values, places, strict=True)):
                beam, id_ = divmod(place, vocab_size)
                if id_ == end_id or length == max_tokens:
                    if text in open_texts and rank < width and value > -torch.inf:
                        ids_so_far = beams[text][beam] + ([] if id_ == end_id else [id_])
                        finished[text].append((value / length**length_penalty, ids_so_far))
                elif len(going) < width:
                    going.append((value, beam, id_))
            going += [(-torch.inf, 0, end_id)] * (width - len(going))
            beams[text] = [[*beams[text][beam], id_] for _, beam, id_ in going]
            rows += [text * width + beam for _, beam, _ in going]
            ids += [id_ for _, _, id_ in going]
            sums_NW[text] = torch.tensor([value for value, _, _ in going], device=device)
            finished[text] = sorted(finished[text], key=lambda item: -item[0])[:width]
            if len(finished[text]) == width and going[0][0] / length**length_penalty <= finished[text][-1][0]:
                open_texts.discard(text)
        if not open_texts or length == max_tokens:
            break
        decoder.reorder(torch.tensor(rows, device=device))
        logits_RV = decoder.read(torch.tensor(ids, device=device)[:, None])
    return [max(found, key=lambda item: item[0])[1] if found else [] for found in finished]
