// Two node lists side by side: nodes of one name face each other, and those that descend from the same operators do.

const NEARBY = 64; // candidates that are looked at for a partner: what took a node's place stands near it

/** Rows {kind, a, b}: same, changed, moved, replaced, removed, added. */
function align(before, after) {
  const place = new Map(after.map((node, index) => [node.name, index]));
  const common = before.map((node, index) => [index, place.get(node.name)]).filter(([, index]) => index !== undefined);
  const rows = [];
  let [i, j] = [0, 0];
  for (const [from, to] of [...increasing(common), [before.length, after.length]]) {
    rows.push(...gap(before.slice(i, from), after.slice(j, to)));
    if (from < before.length)
      rows.push({ kind: sideText(before[from]) === sideText(after[to]) ? "same" : "changed", a: before[from], b: after[to] });
    [i, j] = [from + 1, to + 1];
  }
  return markMoved(rows);
}

/** The longest run of pairs that rises on both sides: patience sorting, n log n. */
function increasing(pairs) {
  const tails = [],
    previous = [];
  pairs.forEach(([, value], index) => {
    let low = 0,
      high = tails.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pairs[tails[middle]][1] < value) low = middle + 1;
      else high = middle;
    }
    previous[index] = low ? tails[low - 1] : -1;
    tails[low] = index;
  });
  const chain = [];
  for (let at = tails.at(-1) ?? -1; at >= 0; at = previous[at]) chain.push(pairs[at]);
  return chain.reverse();
}

/** Between two nodes that stayed: what went and what came, paired where they share a traced operator or a place in the model. */
function gap(gone, come) {
  const rows = [];
  let next = 0;
  for (const node of gone) {
    let partner = -1;
    const end = Math.min(come.length, next + NEARBY);
    for (let at = next; at < end && partner < 0; at += 1) if (related(node, come[at])) partner = at;
    if (partner < 0) {
      rows.push({ kind: "removed", a: node });
      continue;
    }
    for (; next < partner; next += 1) rows.push({ kind: "added", b: come[next] });
    rows.push({ kind: "replaced", a: node, b: come[next] });
    next += 1;
  }
  for (; next < come.length; next += 1) rows.push({ kind: "added", b: come[next] });
  return rows;
}

/** Whether one can be called what became of the other: a part of a constant, or a kindred operator of the same traced ones. */
function related(a, b) {
  if (a.op !== b.op) return false;
  if (a.op === "constant") return weightName(a.constant) === weightName(b.constant);
  const shared = a.origins.length ? a.origins.some((origin) => b.origins.includes(origin)) : Boolean(a.source) && a.source === b.source;
  return shared && kindred(a.operator, b.operator);
}

/** `aten.linear` and `integer_linear`: a word in common. */
function kindred(a, b) {
  const known = new Set(a.split(/[._]/));
  return b.split(/[._]/).some((word) => word !== "aten" && word !== "operator" && known.has(word));
}

/** A node that went here and came there under one name has only moved. */
function markMoved(rows) {
  const come = new Map(rows.filter((row) => row.kind === "added").map((row) => [row.b.name, row]));
  for (const row of rows) {
    const other = row.kind === "removed" ? come.get(row.a.name) : undefined;
    if (other) row.moved = other.moved = true;
  }
  return rows;
}

/** What makes the same change in two layers: kinds of rows and of the nodes on both sides. */
function alikeRows(rows) {
  return rows.map((row) => [row.kind, row.a ? kindOf(row.a) : "", row.b ? kindOf(row.b) : "", row.b?.format ?? ""].join("|")).join("\n");
}

/** Two listings section by section: [{key, layer, rows}] with every key of either side in order. */
function compareListings(before, after) {
  const [old, recent] = [before, after].map((listing) => new Map(sectionsOf(listing).map((section) => [section.key, section])));
  const keys = [...new Set([...old.keys(), ...recent.keys()])].sort((a, b) => sectionRank(a) - sectionRank(b));
  return keys.map((key) => {
    const layer = (old.get(key) ?? recent.get(key)).layer;
    return { key, layer, rows: align(old.get(key)?.nodes ?? [], recent.get(key)?.nodes ?? []) };
  });
}

/** How many rows there are of each kind. */
function countKinds(sections) {
  const counts = { same: 0, changed: 0, replaced: 0, removed: 0, added: 0 };
  for (const section of sections) for (const row of section.rows) counts[row.kind] += 1;
  return counts;
}
