// The graph of one listing: sections that unfold, alike layers as one.

class GraphView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.folded = true;
    this.shown = new Map();
    roving(root, "summary, a.node");
    root.addEventListener("keydown", (event) => foldByKey(event));
  }

  /** Show the listing after pass `number`, with the node called `name` chosen. */
  show(number, name) {
    if (!this.model.listings.length) return this.root.replaceChildren(empty("There is no graph here: the directory holds none."));
    const listing = this.model.listing(number);
    if (listing !== this.listing) this.draw(listing);
    this.choose(name);
  }

  draw(listing) {
    const moved = this.listing !== undefined && this.listing !== listing;
    this.listing = listing;
    if (moved) this.shown.clear();
    const sections = sectionsOf(listing);
    const layers = sections.filter((section) => section.key.startsWith("layer ")).length;
    this.groups = this.folded ? foldAlike(sections, alikeNodes) : sections.map((section) => ({ sections: [section], title: section.key }));
    this.blocks = this.groups.map((group, index) => this.block(group, index));
    this.root.replaceChildren(
      this.tools(listing, layers),
      h(
        "div",
        { class: "listing", role: "region", "aria-label": `graph after ${listing.name}` },
        this.blocks.map((block) => block.element),
      ),
    );
    this.root.querySelector("summary")?.setAttribute("tabindex", "0");
  }

  tools(listing, layers) {
    const options = this.model.listings.map((item) => [item.number, `${item.number} ${item.label}`]);
    const redraw = (folded) => {
      this.folded = folded;
      this.draw(this.listing);
    };
    return h(
      "div",
      { class: "tools" },
      choice("after", options, listing.number, (number) => go(`#graph/${number}`)),
      layers > 1 && toggle("fold alike layers", this.folded, redraw),
      h("span", { class: "sum" }, `${nodesText(listing.nodes.length)}${layers ? `, ${layers} layers` : ""}`),
    );
  }

  block(group, index) {
    const body = h("div", { class: "nodes" });
    const several = group.sections.length > 1;
    const open =
      !["inputs", "shared constants"].includes(group.title) && (this.folded ? index < 6 || group.title === "after the layers" : false);
    const element = h(
      "details",
      { class: `section${several ? " folded" : ""}`, open: open || this.groups.length === 1 },
      this.summary(group),
      body,
    );
    const block = { group, element, body, filled: false };
    element.addEventListener("toggle", () => element.open && this.fill(block));
    if (element.open) this.fill(block);
    return block;
  }

  summary(group) {
    const section = group.sections[0],
      count = group.sections.length;
    const bytes = section.nodes.reduce((sum, node) => sum + (node.op === "constant" ? (node.bytes ?? 0) : 0), 0);
    const differing = differencesIn(group).size;
    return h(
      "summary",
      { tabindex: "-1" },
      h("b", {}, group.title),
      count > 1 && h("span", { class: "times" }, `${count} alike`),
      h("span", { class: "sum" }, `${nodesText(section.nodes.length)}${bytes ? `, ${bytesText(bytes)}` : ""}${count > 1 ? " each" : ""}`),
      differing > 0 && h("span", { class: "differs" }, `${nodesText(differing)} not the same in all`),
    );
  }

  fill(block) {
    if (block.filled) return;
    block.filled = true;
    const section = this.section(block);
    const differences = differencesIn(block.group);
    const rows = section.nodes.map((node, position) => [node, this.row(node, differences.get(position))]);
    const constants = rows.filter(([node]) => node.op === "constant"),
      others = rows.filter(([node]) => node.op !== "constant");
    const inner = others.length && constants.length > 1;
    const bytes = constants.reduce((sum, [node]) => sum + (node.bytes ?? 0), 0);
    block.body.replaceChildren(
      ...[
        block.group.sections.length > 1 && this.picker(block),
        inner
          ? h(
              "details",
              { class: "constants" },
              h("summary", { tabindex: "-1" }, `${constants.length} constants, ${bytesText(bytes)}`),
              constants.map(([, row]) => row),
            )
          : constants.map(([, row]) => row),
        others.map(([, row]) => row),
      ]
        .flat()
        .filter(Boolean),
    );
  }

  section(block) {
    return block.group.sections.find((section) => section.key === this.shown.get(block.group.title)) ?? block.group.sections[0];
  }

  picker(block) {
    const options = block.group.sections.map((section) => [section.key, String(section.layer)]);
    const pick = (key) => {
      this.shown.set(block.group.title, key);
      block.filled = false;
      this.fill(block);
      block.body.querySelector("select").focus();
    };
    return h("div", { class: "picker" }, choice("showing layer", options, this.section(block).key, pick));
  }

  row(node, differing) {
    const why = differing
      ?.map(({ field, values }) => `${field}: ${[...values].map(([value, layers]) => `${value} in ${rangesText(layers)}`).join("; ")}`)
      .join("\n");
    return h(
      "a",
      { class: `node ${node.op}`, href: nodeHref(node.name, this.listing.number), "data-name": node.name, tabindex: "-1" },
      h("span", { class: "call", title: node.call }, callSpans(node)),
      h("span", { class: "type" }, node.type),
      h(
        "span",
        { class: "form" },
        node.format && h("span", { class: "format" }, node.format),
        why && h("span", { class: "differs", title: why }, "≠"),
      ),
    );
  }

  /** Mark a node, unfold what it stands in, and bring it into view. */
  choose(name) {
    this.root.querySelectorAll("[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
    const node = name && this.listing.byName.get(name);
    if (!node) return;
    const block = this.blocks.find(({ group }) => group.sections.some((section) => section.nodes.includes(node)));
    const section = block.group.sections.find((candidate) => candidate.nodes.includes(node));
    if (this.section(block) !== section) {
      this.shown.set(block.group.title, section.key);
      block.filled = false;
    }
    this.fill(block);
    block.element.open = true;
    const row = block.body.querySelector(`[data-name="${CSS.escape(name)}"]`);
    const constants = row.closest("details.constants");
    if (constants) constants.open = true;
    row.setAttribute("aria-current", "true");
    bringIntoView(row);
  }
}

const nodesText = (count) => `${count.toLocaleString("en")} node${count === 1 ? "" : "s"}`;

/** Left folds the section of the focused line, right unfolds it. */
function foldByKey(event) {
  const details = event.target.closest("details");
  if (!details || !["ArrowLeft", "ArrowRight"].includes(event.key) || event.target.matches("select, input")) return;
  event.preventDefault();
  details.open = event.key === "ArrowRight";
  if (!details.open) details.querySelector("summary").focus();
}
