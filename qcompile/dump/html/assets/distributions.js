// Weights and activations before and after: the outliers vanish, or they do not.

class DistributionsView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.kind = (model.distributions.activations ?? []).length ? "activations" : "weights";
    this.layer = "all";
  }

  /** Show all of a kind; `name` brings one into view. */
  show(kind, name) {
    if (!Object.values(this.model.distributions).some((items) => items.length)) {
      return this.root.replaceChildren(
        empty(
          "No distribution was measured: an artifact holds none, and a dump only those that a pass changed.",
          "qcompile compile MODEL --target T -o OUT --dump DIR",
        ),
      );
    }
    if (kind) this.kind = kind;
    if (name) this.layer = "all";
    this.draw();
    const card = name && this.root.querySelector(`[data-name="${CSS.escape(name)}"]`);
    if (!card) return;
    card.setAttribute("aria-current", "true");
    bringIntoView(card);
  }

  draw() {
    const items = this.model.distributions[this.kind] ?? [];
    const layers = [...new Set(items.map((item) => layerOf(item)))].filter((layer) => layer !== undefined);
    const kinds = ["activations", "weights"].map((kind) => [kind, `${kind} (${(this.model.distributions[kind] ?? []).length})`]);
    const shown = items.filter((item) => this.layer === "all" || String(layerOf(item)) === this.layer);
    this.root.replaceChildren(
      h(
        "div",
        { class: "tools" },
        choice("of", kinds, this.kind, (kind) => {
          this.layer = "all";
          go(`#distributions/${kind}`);
        }),
        layers.length > 1 &&
          choice("layer", [["all", "all"], ...layers.map((layer) => [String(layer), String(layer)])], this.layer, (layer) => {
            this.layer = layer;
            this.draw();
          }),
        h(
          "span",
          { class: "keyed" },
          h("span", {}, h("i", { class: "swatch" }), "before"),
          h("span", {}, h("i", { class: "swatch front" }), "at the end"),
        ),
      ),
      shown.length
        ? h(
            "div",
            { class: "cards" },
            shown.map((item) => this.card(item)),
          )
        : h("p", { class: "empty" }, `No pass changed any ${this.kind} that were looked at.`),
    );
  }

  card(item) {
    const { name, stages } = item;
    const [first, last] = [stages[0], stages.length > 1 ? stages.at(-1) : undefined];
    return h(
      "article",
      { class: "card", "data-name": name },
      h("h3", {}, h("code", {}, breakable(distributionTitle(this.kind, item)))),
      h(
        "p",
        { class: "moments" },
        moment("max / rms", first.max_over_rms, last?.max_over_rms),
        moment("kurtosis", first.kurtosis, last?.kurtosis),
      ),
      histogramChart(first, last, name),
      channelChart(first, last, name),
      stages.length > 2 && stageTable(stages),
    );
  }
}

/** Weights go by their names, activations by the weight that multiplies them or the attention that reads them. */
function distributionTitle(kind, item) {
  if (kind === "weights") return item.name;
  return item.kind === "keys" ? `keys of ${item.name}` : `input of ${item.name.replace(/\.weight$/, "")}`;
}

function moment(name, before, after) {
  return h(
    "span",
    {},
    `${name} `,
    h("b", {}, numberText(before)),
    after !== undefined && [" → ", h("b", { class: "after" }, numberText(after))],
  );
}

function layerOf(item) {
  return item.layer ?? undefined;
}
