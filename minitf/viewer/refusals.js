/* Why something is not shown. A refusal, of the server or of the model in the page, has a code and values, and every
 * language a text for the code: `refused_CODE`. The server's own message is in English, for those who ask it directly.
 */

import { LANGUAGES } from "./texts.js";

/** An error that says `refused_CODE` in the language of the page. */
export const refusal = (code, values = {}) => Object.assign(new Error(code), { code, values });

/** What to tell about an error: { key, values } of a text. */
export function problemOf(error) {
  const { code, values = {}, message } = error;
  if (error instanceof TypeError) return { key: "no_answer", values: {} };
  if (error instanceof SyntaxError) return { key: "refused_damaged", values: {} };
  if (`refused_${code}` in LANGUAGES.en) return { key: `refused_${code}`, values: { ...values, reason: message } };
  return { key: "failed", values: { reason: message } };
}

export const problemText = (t, problem) => (problem ? t(problem.key, problem.values) : "");
