// Elements without markup: text goes in as text, so nothing that a model is called can become part of the page.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false && child !== ""));
  return element;
}

/** An HTML element; `on…` attributes are listeners, children are elements or text. */
function h(tag, attributes, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function s(tag, attributes, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

const byId = (id) => document.getElementById(id);

/** A dotted name, or options, that may be broken behind a dot, a comma, a brace. */
function breakable(name) {
  return name.split(/(?<=[.,{])/).flatMap((piece, index) => (index ? [h("wbr"), piece] : [piece]));
}

/** A table of rows of cells; `numbers` are the columns aligned right. */
function table(headers, rows, numbers = [], name = "") {
  const side = (index) => (numbers.includes(index) ? "number" : undefined);
  return h(
    "table",
    { class: name || undefined },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        headers.map((text, index) => h("th", { scope: "col", class: side(index) }, text)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((cells) =>
        h(
          "tr",
          {},
          cells.map((cell, index) => h("td", { class: side(index) }, cell)),
        ),
      ),
    ),
  );
}

/** A labelled drop-down of [value, text] pairs. */
function choice(label, options, chosen, onchange) {
  const select = h(
    "select",
    { onchange: () => onchange(select.value) },
    options.map(([value, text]) => h("option", { value }, text)),
  );
  select.value = chosen;
  return h("label", { class: "choice" }, h("span", {}, label), select);
}

/** A labelled check box. */
function toggle(label, checked, onchange) {
  const box = h("input", { type: "checkbox", onchange: () => onchange(box.checked) });
  box.checked = checked;
  return h("label", { class: "toggle" }, box, label);
}

/** Arrow keys, Home and End move the focus among the elements of `container` that `selector` finds; only one is a stop of Tab. */
function roving(container, selector) {
  const items = () => [...container.querySelectorAll(selector)].filter((item) => item.offsetParent !== null);
  const step = (event, list, at) => {
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: list.length - 1 };
    const to = moves[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    list[Math.min(Math.max(to, 0), list.length - 1)]?.focus();
  };
  container.addEventListener("keydown", (event) => {
    const list = items(),
      at = list.indexOf(document.activeElement);
    if (at >= 0) step(event, list, at);
  });
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (!item) return;
    container.querySelectorAll(`${selector}[tabindex="0"]`).forEach((other) => other.setAttribute("tabindex", "-1"));
    item.setAttribute("tabindex", "0");
  });
}

/** Scroll to an element that is out of sight, to the middle; the focus goes there too, unless it is anywhere else. */
function bringIntoView(element) {
  if (!element) return;
  if (document.activeElement === document.body && element.matches("a")) element.focus({ preventScroll: true });
  const box = element.getBoundingClientRect(),
    room = byId("main").getBoundingClientRect();
  if (box.top < room.top + 56 || box.bottom > room.bottom) element.scrollIntoView({ block: "center" });
}

/** What a view without data shows: why, and how to get it. */
function empty(text, command) {
  return h("div", { class: "empty" }, h("p", {}, text), command && h("pre", {}, command));
}
