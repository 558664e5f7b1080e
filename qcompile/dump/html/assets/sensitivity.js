// Where the divergence from the model comes from: layers by kinds of quantizers and the passes that put them there.

const MEASURES = [
  ["share", "mean of both: these add up"],
  ["off", "vanishes when only this is exact"],
  ["alone", "there when only this is quantized"],
];

class SensitivityView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.measures = MEASURES.filter(([measure]) => model.blame?.cells.some((cell) => cell[measure] !== undefined));
    this.measure = this.measures[0]?.[0];
    roving(root, "[data-cell]");
  }

  show() {
    const blame = this.model.blame;
    if (!blame) {
      return this.root.replaceChildren(
        empty(
          "Nobody has asked yet where the error comes from. This attributes it to layers, kinds and passes, for the dump and this page.",
          "qcompile blame OUT --reference MODEL --dump DIR",
        ),
      );
    }
    const cells = this.cells(blame),
      most = Math.max(...cells.map((cell) => cell.value), 0);
    const said = h("p", { class: "caption", role: "status" }, "Choose a cell to see what it is made of.");
    this.root.replaceChildren(
      h(
        "div",
        { class: "tools" },
        choice(blame.unit ?? "KL", this.measures, this.measure, (measure) => {
          this.measure = measure;
          this.show();
        }),
        heatLegend(most),
        h("span", { class: "sum" }, `${numberText(blame.total_kl)} in all, ${blame.evaluations} evaluations`),
      ),
      h(
        "div",
        { class: "scroll" },
        heatMap(unique(cells, "row"), columnsOf(cells), cells, (cell) => said.replaceChildren(...this.explain(cell))),
      ),
      said,
      h("h2", {}, "The largest"),
      table(
        [
          "",
          "layer",
          "kind",
          "pass",
          "what",
          ...this.measures.map(([measure]) => ({ share: "share", off: "vanishes when exact", alone: "alone" })[measure]),
        ],
        this.ranked(blame.cells),
        [0, 1, 5, 6, 7],
        "ranked",
      ),
      ...this.steps(blame.passes ?? []),
    );
    this.root.querySelector("[data-cell]")?.setAttribute("tabindex", "0");
  }

  /** One per layer, kind and pass: what stands in one place is added up. */
  cells(blame) {
    const kinds = group(blame.cells, (cell) => cell.kind);
    const rowOf = (cell) => (new Set(kinds.get(cell.kind).map((other) => other.pass)).size > 1 ? `${cell.kind}, ${cell.pass}` : cell.kind);
    const places = group(
      blame.cells.map((cell) => ({ ...cell, row: rowOf(cell), column: cell.layer === null ? "others" : String(cell.layer) })),
      (cell) => `${cell.row}|${cell.column}`,
    );
    return [...places.values()].map((parts) => {
      const { row, column } = parts[0],
        value = parts.reduce((total, part) => total + (part[this.measure] ?? 0), 0);
      return {
        row,
        column,
        value,
        parts,
        title: `${row}, ${column === "others" ? "several layers or none" : `layer ${column}`}: ${numberText(value)}`,
      };
    });
  }

  ranked(cells) {
    const order = [...cells].sort((a, b) => (b[this.measure] ?? 0) - (a[this.measure] ?? 0)).slice(0, 24);
    return order.map((cell, index) => [
      String(index + 1),
      cell.layer === null ? "" : String(cell.layer),
      cell.kind,
      cell.pass,
      this.what(cell),
      ...this.measures.map(([measure]) => numberText(cell[measure])),
    ]);
  }

  steps(passes) {
    if (!passes.length) return [];
    const rows = passes.map((step) => [
      step.pass,
      numberText(step.added),
      step.exact ? "yes" : "no",
      step.node ? nodeLink(this.model, step.node) : step.place,
    ]);
    return [h("h2", {}, "Passes without quantizers"), table(["pass", "adds", "claims to be exact", "where it goes wrong"], rows, [1])];
  }

  what(cell) {
    return cell.node ? nodeLink(this.model, cell.node) : h("code", {}, cell.group ?? "");
  }

  explain(cell) {
    const parts = cell.parts.map((item, index) => [index > 0 && "; ", this.what(item), ` ${numberText(item[this.measure])}`]);
    return [h("b", {}, cell.title), " — ", parts].flat(Infinity).filter(Boolean);
  }
}

const unique = (items, key) => [...new Set(items.map((item) => item[key]))];

/** Layers in order, what belongs to none or to several at the end. */
function columnsOf(cells) {
  const rank = (name) => (name === "others" ? Infinity : Number(name));
  return unique(cells, "column").sort((a, b) => rank(a) - rank(b));
}

function group(list, key) {
  const groups = new Map();
  for (const item of list) {
    const place = key(item);
    if (!groups.has(place)) groups.set(place, []);
    groups.get(place).push(item);
  }
  return groups;
}
