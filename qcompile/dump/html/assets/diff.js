// Two listings side by side: only what changed and a little around it, layers in which the same happened as one.

const CONTEXT_ROWS = 2;
const PAGE_ROWS = 400; // drawn at once; the rest waits behind a button
const GLYPHS = { same: ["", ""], changed: ["~", "~"], replaced: ["~", "~"], removed: ["−", ""], added: ["", "+"] };

class DiffView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.folded = true;
    roving(root, "summary, a.side, button.more");
    root.addEventListener("keydown", (event) => foldByKey(event));
  }

  /** Show what lies between the listings after passes `from` and `to`, with a node chosen. */
  show(from, to, name) {
    if (this.model.listings.length < 2) {
      return this.root.replaceChildren(
        empty("A diff needs a dump: an artifact holds the last graph only.", "qcompile compile MODEL --target T -o OUT --dump DIR"),
      );
    }
    const [before, after] = this.pair(from, to);
    if (before !== this.before || after !== this.after) this.draw(before, after);
    this.choose(name);
  }

  pair(from, to) {
    const after = this.model.listing(to ?? "");
    return [from === undefined ? this.model.before(after) : this.model.listing(from), after];
  }

  draw(before, after) {
    [this.before, this.after] = [before, after];
    const sections = compareListings(before, after);
    const changed = sections.filter((section) => section.rows.some((row) => row.kind !== "same"));
    const groups = this.folded
      ? foldAlike(changed, (section) => alikeRows(section.rows))
      : changed.map((section) => ({ sections: [section], title: section.key }));
    const total = groups.reduce((sum, group) => sum + group.sections[0].rows.filter((row) => row.kind !== "same").length, 0);
    this.blocks = groups.map((group) => this.block(group, total < 1500 || groups.length === 1));
    const unchanged = sections.length - changed.length;
    this.root.replaceChildren(
      this.tools(countKinds(sections)),
      h(
        "div",
        { class: "heads", "aria-hidden": "true" },
        h("span", {}, `${before.number} ${before.label}`),
        h("span", {}, `${after.number} ${after.label}`),
      ),
      h(
        "div",
        { class: "hunks" },
        this.blocks.map((block) => block.element),
      ),
      !groups.length && h("p", { class: "empty" }, "These two are the same."),
      unchanged > 0 && groups.length > 0 && h("p", { class: "caption" }, `${unchanged} more sections are the same on both sides.`),
    );
    this.root.querySelector("summary")?.setAttribute("tabindex", "0");
  }

  tools(counts) {
    const options = this.model.listings.map((item) => [item.number, `${item.number} ${item.label}`]);
    const goTo = (from, to) => go(`#diff/${from}..${to}`);
    const redraw = (folded) => {
      this.folded = folded;
      this.draw(this.before, this.after);
    };
    return h(
      "div",
      { class: "tools" },
      choice("from", options, this.before.number, (number) => goTo(number, this.after.number)),
      choice("to", options, this.after.number, (number) => goTo(this.before.number, number)),
      h("span", { class: "steps" }, this.step("[", "the pass before", -1), this.step("]", "the pass after", 1)),
      toggle("fold alike layers", this.folded, redraw),
      h(
        "span",
        { class: "sum", role: "status" },
        h("span", { class: "added" }, `+${counts.added}`),
        h("span", { class: "removed" }, `−${counts.removed}`),
        h("span", { class: "changed" }, `~${counts.changed + counts.replaced}`),
        h("span", {}, `${counts.same.toLocaleString("en")} the same`),
      ),
    );
  }

  /** One pass on or back: the listing and the one before it. */
  step(key, label, by) {
    const to = this.neighbour(by);
    return h(
      "button",
      { type: "button", "aria-label": label, title: `${label} (${key})`, disabled: !to, onclick: () => this.move(by) },
      by < 0 ? "‹" : "›",
    );
  }

  neighbour(by) {
    const index = this.model.listings.indexOf(this.after) + by;
    return index > 0 ? this.model.listings[index] : undefined;
  }

  move(by) {
    const to = this.neighbour(by);
    if (to) go(`#diff/${this.model.before(to).number}..${to.number}`);
  }

  block(group, open) {
    const rows = group.sections[0].rows,
      several = group.sections.length > 1;
    const counts = countKinds([group.sections[0]]);
    const body = h("div", { class: "rows" });
    const element = h(
      "details",
      { class: `section${several ? " folded" : ""}`, open },
      h(
        "summary",
        { tabindex: "-1" },
        h("b", {}, group.title),
        several && h("span", { class: "times" }, `${group.sections.length} alike`),
        h(
          "span",
          { class: "sum" },
          counts.added > 0 && h("span", { class: "added" }, `+${counts.added}`),
          counts.removed > 0 && h("span", { class: "removed" }, `−${counts.removed}`),
          counts.changed + counts.replaced > 0 && h("span", { class: "changed" }, `~${counts.changed + counts.replaced}`),
          several && h("span", {}, "each"),
        ),
      ),
      body,
    );
    const pager = new Pager(body, this.hunks(rows));
    const block = { group, element, pager, fill: once(() => pager.next()) };
    element.addEventListener("toggle", () => element.open && block.fill());
    if (open) block.fill();
    return block;
  }

  /** Functions that make the lines, long stretches of the same behind a button. */
  hunks(rows) {
    const near = rows.map(() => false);
    rows.forEach((row, index) => {
      if (row.kind === "same") return;
      for (let at = index - CONTEXT_ROWS; at <= index + CONTEXT_ROWS; at += 1) if (at >= 0 && at < rows.length) near[at] = true;
    });
    const made = [];
    for (let start = 0; start < rows.length;) {
      let end = start + 1;
      while (end < rows.length && near[end] === near[start]) end += 1;
      const run = rows.slice(start, end);
      if (near[start] || run.length < 3) made.push(...run.map((row) => () => this.row(row)));
      else made.push(() => this.more(run));
      start = end;
    }
    return made;
  }

  more(run) {
    const button = h(
      "button",
      {
        class: "more",
        type: "button",
        tabindex: "-1",
        onclick: () => {
          const rows = run.map((row) => this.row(row));
          button.replaceWith(...rows);
          rows[0].querySelector("a").focus();
        },
      },
      `${run.length} the same`,
    );
    return button;
  }

  row(row) {
    const [before, after] = [row.a && shownText(row.a, row.b), row.b && shownText(row.b, row.a)];
    const [left, right] = row.a && row.b ? wordSpans(before, after) : [before, after];
    const [minus, plus] = GLYPHS[row.kind];
    return h(
      "div",
      { class: `pair ${row.kind}${row.moved ? " moved" : ""}` },
      this.side(row.a, left, minus, this.before),
      this.side(row.b, right, plus, this.after),
    );
  }

  side(node, text, glyph, listing) {
    if (!node) return h("span", { class: "side none" });
    const href = `#diff/${this.before.number}..${this.after.number}?node=${encodeURIComponent(node.name)}@${listing.number}`;
    return h(
      "a",
      { class: "side", href, "data-name": node.name, tabindex: "-1" },
      h("span", { class: "glyph" }, glyph),
      h("span", { class: "text" }, text),
    );
  }

  /** Mark both sides of a node; a section in which it stands is unfolded. */
  choose(name) {
    this.root.querySelectorAll("[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
    if (!name) return;
    const block = this.blocks.find(({ group }) => group.sections[0].rows.some((row) => row.a?.name === name || row.b?.name === name));
    if (!block) return;
    block.fill();
    block.element.open = true;
    const sides = () => [...block.element.querySelectorAll(`[data-name="${CSS.escape(name)}"]`)];
    while (!sides().length && block.pager.next());
    const found = sides();
    found.forEach((side) => side.setAttribute("aria-current", "true"));
    bringIntoView(found[0]);
  }
}

/** Everything about a node that makes a difference here: the call, the type, the format, and what was done to a constant. */
function sideText(node) {
  return `${headText(node)}  [${node.log.join(" | ")}]`;
}

function headText(node) {
  return `${constantName(node) ?? node.call}  ${[node.type, node.format].filter(Boolean).join(" ")}`.trimEnd();
}

/** A node as one side shows it; of what was done to a constant only what was not done to `other`. */
function shownText(node, other) {
  let common = 0;
  while (common < node.log.length && node.log[common] === other?.log[common]) common += 1;
  const more = other ? node.log.slice(common) : [];
  return more.length ? `${headText(node)}  [${common ? "… | " : ""}${more.join(" | ")}]` : headText(node);
}

/** Draws lines a page at a time: what `makers` make is appended to `body`, and a button for what is left. */
class Pager {
  constructor(body, makers) {
    Object.assign(this, { body, makers, drawn: 0 });
    this.button = h("button", { class: "more", type: "button", tabindex: "-1", onclick: () => this.next() });
  }

  /** Draw the next page; false if there is none. */
  next() {
    if (this.drawn >= this.makers.length) return false;
    this.button.remove();
    const page = this.makers.slice(this.drawn, this.drawn + PAGE_ROWS);
    this.drawn += page.length;
    this.body.append(...page.map((make) => make()));
    this.button.textContent = `${this.makers.length - this.drawn} more lines`;
    if (this.drawn < this.makers.length) this.body.append(this.button);
    return true;
  }
}

function once(action) {
  let done = false;
  return () => {
    if (!done) {
      done = true;
      action();
    }
  };
}
