// The panel at the right: everything about one node, or one pass.

/** A heading with content under it; nothing without content. */
function part(title, ...content) {
  const shown = content.flat().filter(Boolean);
  return shown.length ? h("section", { class: "part" }, h("h3", {}, title), shown) : undefined;
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return h(
    "dl",
    { class: "facts" },
    known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
}

function heading(kind, name) {
  return h(
    "div",
    { class: "heading" },
    h("span", { class: "kind" }, kind),
    h("h2", {}, breakable(name)),
    h(
      "button",
      { type: "button", class: "close", "aria-label": "Close details", title: "Close (Esc)", onclick: () => closeInspector() },
      "×",
    ),
  );
}

/** The panel of a node. */
function nodeDetails(model, name, number) {
  const listing = model.listingWith(name, number);
  if (!listing) return [heading("not found", name), h("p", {}, `No listing has a node called ${name}.`)];
  const node = listing.byName.get(name),
    row = model.coverageOf.get(name);
  const notes = model.notes.filter((note) => note.node === name);
  const reasons = [
    ...new Set([...notes.map((note) => `${note.pass}: ${note.reason}`), ...(row?.reason && !notes.length ? [row.reason] : [])]),
  ];
  return [
    heading(node.op, constantName(node) ?? node.name),
    facts(
      [
        ["operator", node.op === "call" && h("code", {}, node.operator)],
        ["type", h("code", {}, node.type)],
        ["format", node.format && h("span", { class: "format" }, node.format)],
        ["layer", node.layer],
        ["bytes", node.bytes !== null && node.bytes !== undefined && bytesText(node.bytes)],
        ["seen after", h("a", { href: nodeHref(name, listing.number) }, `${listing.number} ${listing.label}`)],
      ].filter(([, value]) => value !== false),
    ),
    reasons.length > 0 && h("p", { class: "reason" }, h("b", {}, "left alone "), reasons.join("; ")),
    node.op !== "constant" && h("pre", { class: "call" }, linkedCall(node, listing)),
    part("Where it comes from", chain(model, node, name)),
    part(
      "What was done to it",
      node.log?.length > 0 &&
        h(
          "ol",
          { class: "log" },
          node.log.map((entry) => h("li", {}, h("code", {}, entry))),
        ),
    ),
    model.listings.length > 1 && part("Through the pipeline", history(model, node, name)),
    distributionParts(model, node, listing),
    part("Reads", names(node.inputs, listing)),
    part("Read by", names(listing.users(name), listing)),
  ];
}

/** Source line, traced operators, passes, kernel: one under the other. */
function chain(model, node, name) {
  const row = model.coverageOf.get(name),
    kernels = model.kernelsOf.get(name) ?? [];
  const kernel = kernels.length
    ? kernels.map((item) =>
        h("div", {}, h("a", { href: kernelHref(item.name) }, h("code", {}, item.name)), " ", h("small", {}, resources(item))),
      )
    : row?.kernel && h("code", {}, row.kernel);
  const steps = [
    ["source", node.source && h("code", {}, node.source)],
    [
      "traced",
      node.origins.length > 0 &&
        clipped(
          node.origins.map((origin) => h("div", {}, h("code", {}, origin))),
          6,
        ),
    ],
    ["passes", node.passes.length > 0 && node.passes.map((label, index) => [index > 0 && " › ", passLink(model, label, name)])],
    ["kernel", kernel],
  ];
  return h(
    "ol",
    { class: "chain" },
    steps.filter(([, value]) => value).map(([label, value]) => h("li", {}, h("span", { class: "step" }, label), h("div", {}, value))),
  );
}

/** Of passes that run more than once, the one in which the node changed, else the first that changed anything. */
function passLink(model, label, name) {
  const event = model.history(name).find(({ listing }) => listing.label === label);
  const record = model.passes.find((item) => item.name === label && item.changed);
  const number = event?.listing.number ?? (record && passNumber(record));
  return number ? h("a", { href: passHref(number) }, label) : label;
}

function resources(kernel) {
  return kernel.launches.length ? `${mostOf(kernel, "registers")} registers, ${bytesText(mostOf(kernel, "shared_bytes"))} shared` : "";
}

function history(model, node, name) {
  const rows = model
    .history(name)
    .map(({ listing, event, changed }) =>
      h(
        "li",
        {},
        h(
          "a",
          { href: event === "goes" ? passHref(listing.number) : nodeHref(name, listing.number) },
          h("span", { class: "key" }, listing.number),
          ` ${listing.label}`,
        ),
        h("span", { class: event }, ` ${event}${changed.length ? `: ${changed.join(", ")}` : ""}`),
      ),
    );
  const became = model.last.byName.has(name) ? [] : model.last.nodes.filter((other) => related(node, other)).slice(0, 6);
  return [
    h("ol", { class: "events" }, rows),
    became.length > 0 &&
      h(
        "p",
        {},
        "Its place is taken by ",
        became.map((other, index) => [
          index > 0 && ", ",
          h("a", { href: nodeHref(other.name, model.last.number) }, h("code", {}, other.name)),
        ]),
        ".",
      ),
  ];
}

function distributionParts(model, node, listing) {
  return model.distributionsOf(node, listing).map(({ kind, item }) => {
    const { stages, name } = item,
      [first, last] = [stages[0], stages.length > 1 ? stages.at(-1) : undefined];
    return part(
      `Distribution of ${distributionTitle(kind, item)}`,
      histogramChart(first, last, name),
      channelChart(first, last, name),
      stageTable(stages),
      h("p", {}, h("a", { href: `#distributions/${kind}/${encodeURIComponent(name)}` }, "beside the others")),
    );
  });
}

function names(list, listing) {
  const unique = [...new Set(list)];
  const items = unique.map((name) =>
    h(
      "li",
      {},
      h("a", { href: nodeHref(name, listing.number) }, h("code", {}, name)),
      h("span", { class: "type" }, ` ${listing.byName.get(name)?.type ?? ""}`),
    ),
  );
  return items.length > 0 && h("ul", { class: "names" }, clipped(items, 8));
}

/** The first few, and the rest behind a button. */
function clipped(items, most) {
  if (items.length <= most + 1) return items;
  const more = h(
    "li",
    {},
    h("button", { type: "button", class: "link", onclick: () => more.replaceWith(...items.slice(most)) }, `${items.length - most} more`),
  );
  return [...items.slice(0, most), more];
}

/** The panel of a pass: options, figures, what it changed by operator, what it left alone. */
function passDetails(model, number) {
  const record = model.pass(number),
    listing = model.listing(number);
  if (!record)
    return number === "000" && listing
      ? inputDetails(model, listing)
      : [heading("not found", number), h("p", {}, `There is no pass ${number}.`)];
  const own = listing && listing.number === passNumber(record);
  const notes = model.notes.filter((note) => note.pass === record.name);
  return [
    heading(`pass ${passNumber(record)}`, record.name),
    facts([
      ["as written", h("code", { class: "wrap" }, breakable(record.spec))],
      ["claims", record.exact === undefined ? undefined : record.exact ? "the same function" : "to lose precision"],
      ["time", `${record.seconds.toFixed(2)} s`],
      ["nodes", `${record.nodes_before.toLocaleString("en")} → ${record.nodes_after.toLocaleString("en")}`],
      ["constants", bytesText(record.bytes)],
      ["max error", record.max_error !== null && record.max_error !== undefined ? numberText(record.max_error) : undefined],
      ["SQNR", record.sqnr_db !== null && record.sqnr_db !== undefined ? `${record.sqnr_db.toFixed(1)} dB` : undefined],
      ["KL", record.kl !== null && record.kl !== undefined ? numberText(record.kl) : undefined],
      ["so far", soFar(record)],
    ]),
    own
      ? h(
          "p",
          { class: "actions" },
          h("a", { class: "button", href: `#diff/${model.before(listing).number}..${listing.number}` }, "What it changed"),
          h("a", { class: "button", href: `#graph/${listing.number}` }, "The graph after it"),
        )
      : h("p", { class: "caption" }, record.changed ? "Its listing is not in this report." : "It changed nothing."),
    own && part("By operator", operatorTable(model.before(listing), listing)),
    own && stagesOf(model, listing),
    part("Left alone", noteList(model, notes)),
  ];
}

/** What this and all passes before it did to the output, where it was measured. */
function soFar(record) {
  const known = [
    ["SQNR", record.total_sqnr_db, " dB"],
    ["KL", record.total_kl, ""],
  ].filter(([, value]) => value !== null && value !== undefined);
  return known.map(([name, value, unit]) => `${name} ${numberText(value)}${unit}`).join(", ");
}

function inputDetails(model, listing) {
  return [
    heading("input", "the graph as traced"),
    facts([["nodes", listing.nodes.length.toLocaleString("en")]]),
    h("p", { class: "actions" }, h("a", { class: "button", href: `#graph/${listing.number}` }, "The graph")),
    part(
      "By operator",
      table(
        ["operator", "count"],
        [...operatorCounts(listing)].sort((a, b) => b[1] - a[1]).map(([name, count]) => [h("code", {}, name), String(count)]),
        [1],
      ),
    ),
  ];
}

function operatorCounts(listing) {
  const counts = new Map();
  for (const node of listing.nodes) {
    const name = node.op === "call" ? node.operator : `${node.op}s`;
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return counts;
}

function operatorTable(before, after) {
  const [old, recent] = [operatorCounts(before), operatorCounts(after)];
  const rows = [...new Set([...old.keys(), ...recent.keys()])]
    .map((name) => [name, old.get(name) ?? 0, recent.get(name) ?? 0])
    .filter(([, a, b]) => a !== b);
  rows.sort((a, b) => Math.abs(b[2] - b[1]) - Math.abs(a[2] - a[1]));
  if (!rows.length) return h("p", { class: "caption" }, "The same operators in the same numbers.");
  return table(
    ["operator", "before", "after", "change"],
    rows.map(([name, a, b]) => [
      h("code", {}, name),
      String(a),
      String(b),
      h("span", { class: b > a ? "added" : "removed" }, b > a ? `+${b - a}` : `−${a - b}`),
    ]),
    [1, 2, 3],
  );
}

/** Distributions that this pass changed, those first whose tails it changed most. */
function stagesOf(model, listing) {
  const found = ["activations", "weights"]
    .flatMap((kind) =>
      (model.distributions[kind] ?? []).map((item) => {
        const at = item.stages.findIndex((stage) => stage.listing === listing.name);
        return { kind, item, old: item.stages[at - 1], now: item.stages[at] };
      }),
    )
    .filter(({ old }) => old);
  const change = ({ old, now }) => Math.abs(Math.log((now.max_over_rms || 1) / (old.max_over_rms || 1)));
  found.sort((a, b) => change(b) - change(a));
  const link = ({ kind, item }) =>
    h("a", { href: `#distributions/${kind}/${encodeURIComponent(item.name)}` }, h("code", {}, breakable(distributionTitle(kind, item))));
  const both = (old, now) => `${numberText(old)} → ${numberText(now)}`;
  const rows = found
    .slice(0, 10)
    .map((row) => [link(row), both(row.old.max_over_rms, row.now.max_over_rms), both(row.old.kurtosis, row.now.kurtosis)]);
  return rows.length > 0 && part("Distributions", table(["", "max / rms", "kurtosis"], rows, [1, 2], "stages"));
}

/** A name as a link to where it was last seen; as text if it is no node's. */
function nodeLink(model, name) {
  const known = model.nodeNamed(name),
    listing = model.listingWith(known, model.last?.number ?? "000"),
    text = h("code", {}, name);
  return listing ? h("a", { href: nodeHref(known, listing.number) }, text) : text;
}

function noteList(model, notes) {
  const groups = new Map();
  for (const note of notes) {
    const reason = note.reason.replace(/^(\w+?)_\d+: /, "$1: ");
    groups.set(reason, [...(groups.get(reason) ?? []), note]);
  }
  return (
    groups.size > 0 &&
    h(
      "ul",
      { class: "noted" },
      [...groups].map(([reason, members]) =>
        h(
          "li",
          {},
          h("span", { class: "mark" }, members[0].chosen ? "chosen" : "not possible"),
          ` ${reason} `,
          h(
            "ul",
            { class: "names" },
            clipped(
              members.map((note) => h("li", {}, nodeLink(model, note.node))),
              4,
            ),
          ),
        ),
      ),
    )
  );
}
