// Search over nodes of all listings, constants, kernels and passes.

class Search {
  constructor(model, input, list) {
    Object.assign(this, { model, input, list, found: [], chosen: 0 });
    input.addEventListener("input", () => this.look());
    input.addEventListener("focus", () => input.value && this.look());
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => setTimeout(() => this.close(), 150));
  }

  /** Made when first asked for: every name once, as it was last seen. */
  entries() {
    if (this.all) return this.all;
    const nodes = new Map();
    for (const listing of this.model.listings) for (const node of listing.nodes) nodes.set(node.name, { node, listing });
    this.all = [
      ...this.model.passes.map((record) => entry("pass", record.name, record.spec, passHref(passNumber(record)), passNumber(record))),
      ...this.model.kernels.map((kernel) => entry("kernel", kernel.name, kernel.spec, kernelHref(kernel.name), kernel.spec)),
      ...[...nodes.values()].map(({ node, listing }) => this.nodeEntry(node, listing)),
    ];
    return this.all;
  }

  nodeEntry(node, listing) {
    const kind = node.op === "call" ? "node" : node.op,
      form = node.format || node.type;
    const gone = listing === this.model.last ? "" : `until ${listing.number}`;
    const detail = [node.name, node.operator, node.type, node.format ?? "", node.source].join(" ");
    return entry(
      kind,
      constantName(node) ?? node.name,
      detail,
      nodeHref(node.name, listing.number),
      gone || (node.operator === node.name ? form : node.operator || form),
      Boolean(gone),
    );
  }

  look() {
    const wanted = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.found = wanted.length ? this.rank(wanted).slice(0, 40) : [];
    this.chosen = 0;
    this.draw(wanted.length > 0);
  }

  rank(wanted) {
    const scored = [];
    for (const item of this.entries()) {
      if (!wanted.every((word) => item.text.includes(word))) continue;
      const title = item.title.toLowerCase();
      const score = title === wanted[0] ? 0 : title.startsWith(wanted[0]) ? 1 : wanted.every((word) => title.includes(word)) ? 2 : 3;
      scored.push([score + (item.gone ? 0.5 : 0), item]);
    }
    return scored
      .sort((a, b) => a[0] - b[0] || a[1].title.length - b[1].title.length || (a[1].title < b[1].title ? -1 : 1))
      .map(([, item]) => item);
  }

  draw(asked) {
    this.list.replaceChildren(
      ...this.found.map((item, index) =>
        h(
          "li",
          {
            role: "option",
            id: `result-${index}`,
            onmousedown: (event) => {
              event.preventDefault();
              this.open(index);
            },
          },
          h("span", { class: "kind" }, item.kind),
          h("span", { class: "title" }, item.title),
          h("span", { class: "note" }, item.note),
        ),
      ),
      ...(asked && !this.found.length ? [h("li", { class: "none" }, "Nothing is called that.")] : []),
    );
    this.list.hidden = !asked;
    this.input.setAttribute("aria-expanded", String(asked));
    this.mark();
  }

  mark() {
    [...this.list.children].forEach((item, index) => item.setAttribute("aria-selected", String(index === this.chosen)));
    const item = this.found.length ? byId(`result-${this.chosen}`) : undefined;
    if (item) this.input.setAttribute("aria-activedescendant", item.id);
    else this.input.removeAttribute("aria-activedescendant");
    item?.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by && this.found.length) {
      event.preventDefault();
      this.chosen = (this.chosen + by + this.found.length) % this.found.length;
      this.mark();
    } else if (event.key === "Enter" && this.found.length) {
      event.preventDefault();
      this.open(this.chosen);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.input.value = "";
      this.close();
      this.input.blur();
    }
  }

  open(index) {
    go(this.found[index].href);
    this.close();
    this.input.blur();
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }
}

function entry(kind, title, detail, href, note, gone = false) {
  return { kind, title, href, note, gone, text: `${title} ${detail} ${kind}`.toLowerCase() };
}
