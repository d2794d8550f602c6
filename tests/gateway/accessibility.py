"""JavaScript expressions that find what is hard to read or to use in a page, and that return a list of it."""

from __future__ import annotations

from typing import Final

LOW_CONTRAST: Final = """
(() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((each) => each / 255)
    .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (each) => {
    for (let at = each; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !each.checkVisibility() || each.closest("script, style, noscript, .skip")) continue;
    const style = getComputedStyle(each);
    const [a, b] = [light(parts(each.closest("svg") ? style.fill : style.color)), light(behind(each))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${each.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""
"""Texts whose colour has a contrast of less than 4.5 to what is behind them (WCAG 2.2, 1.4.3)."""

BARRIERS: Final = """
(() => {
  const found = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const check = (good, text) => { if (!good) found.push(text); };
  check(document.documentElement.lang === "en", "the language is unknown");
  check(document.title, "there is no title");
  for (const landmark of ["header", "main", "footer", "h1"]) check(all(landmark).length === 1, `not one ${landmark}`);
  const ids = all("[id]").map((each) => each.id);
  check(new Set(ids).size === ids.length, "an id occurs twice");
  for (const each of all("[aria-labelledby], label[for]")) {
    const id = each.getAttribute("aria-labelledby") ?? each.getAttribute("for");
    check(document.getElementById(id), `${id} does not exist`);
  }
  let level = 0;
  for (const each of all("h1, h2, h3, h4")) {
    const own = Number(each.tagName[1]);
    check(own <= level + 1, `a level is skipped before ${each.textContent}`);
    level = own;
  }
  for (const each of all("table")) {
    check(each.getAttribute("aria-labelledby") || each.getAttribute("aria-label"), "a table has no name");
    check([...each.rows].every((row) => row.querySelector("th[scope]")), `a row of ${each.id} has no heading`);
    const parts = [...each.querySelectorAll("tr, th, td")];
    check(parts.every((part) => part.getAttribute("role")), `${each.id} lacks roles`);
  }
  for (const each of all("input")) check(each.labels.length, "an input has no label");
  for (const each of all("button, a, summary")) check(each.textContent.trim(), "a control has no name");
  for (const each of all("svg")) {
    check(each.getAttribute("aria-hidden") || each.getAttribute("aria-label"), "a picture has no text");
  }
  check(all("[aria-live], [role=status], [role=alert]").length === 1, "not one live region");
  check(all("[tabindex]").every((each) => each.tabIndex <= 0), "the order of the focus is forced");
  const small = all("a, button, summary, input").filter((each) => each.checkVisibility()
    && !each.closest("p, footer, .skip") && each.getBoundingClientRect().height < 24);
  check(!small.length, `too small to be hit: ${small.map((each) => each.textContent)}`);
  return found;
})()
"""
"""Violations of the basic rules of accessibility that can be found without judgement."""
