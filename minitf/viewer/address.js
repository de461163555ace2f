/* Keeps the state in the page's address, and takes it from there at the start; copies it as a link. */

import { copyText } from "./save.js";
import { fromAddress, toAddress } from "./state.js";

const WAIT_MS = 300; // an address is written at most this often: browsers refuse more than some per second

/** `place` is a source's `address`. */
export function addressKeeper(place, store) {
  const asked = place.read();
  if (asked) store.set(fromAddress(asked));
  let [timer, written] = [0, asked];
  function write() {
    timer = 0;
    const now = toAddress(store.get());
    if (now === written) return;
    written = now;
    place.write(now);
  }
  return {
    update() {
      timer ||= setTimeout(write, WAIT_MS);
    },
    /** Copy a link to what is shown at `step`; whether that worked. */
    copy: (step) => copyText(place.link(toAddress(store.get(), step))),
  };
}
