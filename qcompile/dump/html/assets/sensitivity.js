// Where the KL divergence comes from: layers by passes and kinds.

class SensitivityView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.measure = "off";
    roving(root, "[data-cell]");
  }

  show() {
    const blame = this.model.blame;
    if (!blame) {
      return this.root.replaceChildren(empty("Nobody has asked yet where the error comes from. This attributes it to layers, passes and kinds, and adds it to the dump:", "qcompile blame OUT --reference MODEL --dump DIR"));
    }
    const cells = blame.cells.map((cell) => ({ ...cell, row: `${cell.kind}`, column: cell.layer === null ? "rest" : String(cell.layer), value: cell[this.measure] ?? 0 }));
    const merged = [...group(cells, (cell) => `${cell.row}|${cell.column}`).values()].map((list) => ({ ...list[0], value: sum(list), parts: list, title: `${list[0].row}, ${list[0].layer === null ? "no layer" : `layer ${list[0].layer}`}: ${numberText(sum(list))} nats` }));
    const columns = [...new Set(merged.map((cell) => cell.column))].sort((a, b) => (a === "rest" ? Infinity : Number(a)) - (b === "rest" ? Infinity : Number(b)));
    const rows = ["weights", "activations", "cache"].filter((kind) => merged.some((cell) => cell.row === kind));
    const said = h("p", { class: "caption", role: "status" }, "Choose a cell to see its parts.");
    const most = Math.max(...merged.map((cell) => cell.value), 0);
    this.root.replaceChildren(
      h("div", { class: "tools" }, choice("KL", [["off", "that vanishes when only this is exact"], ["alone", "when only this is quantized"]], this.measure, (measure) => { this.measure = measure; this.show(); }), heatLegend(most),
        h("span", { class: "sum" }, `${numberText(blame.total_kl)} nats in all, ${blame.evaluations} evaluations`)),
      h("div", { class: "scroll" }, heatMap(rows, columns, merged, (cell) => said.replaceChildren(...this.explain(cell)))),
      said,
      h("h2", {}, "The largest"),
      table(["", "layer", "kind", "pass", "what", "vanishes when exact", "alone"], this.ranked(blame.cells), [0, 1, 5, 6], "ranked"),
    );
    this.root.querySelector("[data-cell]")?.setAttribute("tabindex", "0");
  }

  ranked(cells) {
    const order = [...cells].sort((a, b) => (b[this.measure] ?? 0) - (a[this.measure] ?? 0)).slice(0, 24);
    return order.map((cell, index) => [String(index + 1), cell.layer === null ? "" : String(cell.layer), cell.kind, cell.pass, this.what(cell), numberText(cell.off), numberText(cell.alone)]);
  }

  what(cell) {
    return cell.node ? nodeLink(this.model, cell.node) : h("code", {}, cell.group ?? "");
  }

  explain(cell) {
    const parts = cell.parts.map((item, index) => [index > 0 && "; ", `${item.pass} `, this.what(item), ` ${numberText(item[this.measure])}`]);
    return [h("b", {}, cell.title), " — ", parts].flat(Infinity).filter(Boolean);
  }
}

const sum = (list) => list.reduce((total, cell) => total + cell.value, 0);

function group(list, key) {
  const groups = new Map();
  for (const item of list) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}
