// A listing in sections, one per layer of the model, and layers that are alike as one.

/** What makes two nodes of two layers the same: everything but names and numbers. */
function kindOf(node) {
  return [node.op, node.op === "constant" ? node.folded : node.operator, node.type, node.inputs.length].join(" ");
}

/** The sections of a listing: inputs and shared constants, what comes before the layers, each layer, what comes after. */
function sectionsOf(listing) {
  const found = new Map();
  for (const [node, layer] of layersOf(listing)) {
    const key = typeof layer === "number" ? `layer ${layer}` : layer;
    if (!found.has(key)) found.set(key, { key, layer, nodes: [] });
    found.get(key).nodes.push(node);
  }
  return [...found.values()].sort((a, b) => sectionRank(a.key) - sectionRank(b.key));
}

/** Each node with its layer or the name of another section; a call of no layer between two of a layer belongs to the one before it. */
function layersOf(listing) {
  const layered = listing.nodes
    .map((node, index) => (node.op === "call" && node.layer !== null ? index : -1))
    .filter((index) => index >= 0);
  const last = layered.at(-1) ?? -1;
  let current = layered.length ? "before the layers" : "operators";
  return listing.nodes.map((node, index) => {
    if (node.op === "input") return [node, "inputs"];
    if (node.op === "constant") return [node, node.layer ?? "shared constants"];
    if (node.layer !== null) current = node.layer;
    return [node, node.layer ?? (last >= 0 && index > last ? "after the layers" : current)];
  });
}

function sectionRank(key) {
  const order = ["inputs", "shared constants", "before the layers", "operators"];
  const rank = order.indexOf(key);
  if (rank >= 0) return rank - order.length;
  return key === "after the layers" ? Infinity : Number(key.split(" ")[1]);
}

/** Sections whose `signature` is the same as one group, in order of the first; anything but a layer stays alone. */
function foldAlike(sections, signature) {
  const groups = new Map();
  for (const section of sections) {
    const layered = section.key.startsWith("layer ");
    const key = layered ? `layer|${signature(section)}` : section.key;
    if (!groups.has(key)) groups.set(key, { sections: [], layered });
    groups.get(key).sections.push(section);
  }
  return [...groups.values()].map((group) => ({ ...group, title: groupTitle(group) }));
}

function groupTitle({ sections, layered }) {
  if (!layered) return sections[0].key;
  const numbers = sections.map((section) => section.layer);
  return numbers.length === 1 ? `layer ${numbers[0]}` : `layers ${rangesText(numbers)}`;
}

const alikeNodes = (section) => section.nodes.map(kindOf).join("\n");

/** In a group of alike layers: position -> [{field, values: Map(value -> layers)}] where not all layers say the same. */
function differencesIn(group) {
  const found = new Map();
  if (group.sections.length < 2) return found;
  group.sections[0].nodes.forEach((_, position) => {
    const fields = ["format", "log", "passes"].map((field) => ({ field, values: valuesAt(group, position, field) }));
    const differing = fields.filter(({ values }) => values.size > 1);
    if (differing.length) found.set(position, differing);
  });
  return found;
}

function valuesAt(group, position, field) {
  const values = new Map();
  for (const section of group.sections) {
    const text = [section.nodes[position][field] ?? "none"].flat().join(" › ") || "none";
    if (!values.has(text)) values.set(text, []);
    values.get(text).push(section.layer);
  }
  return values;
}
