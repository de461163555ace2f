/* Preferences: the language and the keys, remembered for the next visit, and the light or dark theme. */

import { LANGUAGES } from "./texts.js";

export function remembered(name) {
  try {
    return localStorage.getItem(`minitf-${name}`);
  } catch { // a page opened from a file may have no storage
    return null;
  }
}

export function remember(name, value) {
  try { localStorage.setItem(`minitf-${name}`, value); } catch { /* not remembered, then */ }
}

export function preferredLanguage() {
  const stored = remembered("language");
  if (stored in LANGUAGES) return stored;
  return navigator.language.startsWith("zh") ? "zh" : "en";
}

/** The system's theme, until the button changes it. */
export function systemTheme() {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null;
  const now = () => chosen ?? (scheme.matches ? "dark" : "light");
  const tell = () => { document.documentElement.dataset.theme = now(); listeners.forEach((listener) => listener()); };
  scheme.addEventListener("change", tell);
  document.documentElement.dataset.theme = now();
  return { now, onChange: (listener) => listeners.push(listener), toggle: () => { chosen = now() === "dark" ? "light" : "dark"; tell(); } };
}
