// Kernels: what each implements, what it takes of the device, its source.

function drawKernels(model, root, chosen) {
  if (!model.kernels.length) return root.replaceChildren(empty("No kernel is named here: the compilation did not come so far."));
  const built = model.kernels.some((kernel) => kernel.launches.length);
  const columns = [
    ["kernel", (kernel) => h("a", { href: kernelHref(kernel.name), class: "row-link" }, h("code", {}, kernel.name))],
    ["implements", (kernel) => h("code", { class: "spec", title: kernel.spec }, kernel.spec)],
    ["nodes", (kernel) => kernel.nodes.length || ""],
    ...(built
      ? [
          ["launches", (kernel) => kernel.launches.length || ""],
          ["registers", (kernel) => mostOf(kernel, "registers") || ""],
          ["shared", (kernel) => mostOf(kernel, "shared_bytes") && bytesText(mostOf(kernel, "shared_bytes"))],
          ["lines", (kernel) => (kernel.source ? kernel.source.split("\n").length : "")],
        ]
      : []),
  ];
  const side = (index) => (index > 1 ? "number" : undefined);
  const rows = model.kernels.map((kernel) =>
    h(
      "tr",
      { "aria-current": kernel.name === chosen ? "true" : undefined },
      columns.map(([, cell], index) => h("td", { class: side(index) }, shownCell(cell(kernel)))),
    ),
  );
  root.replaceChildren(
    h(
      "table",
      { class: "kernels" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map(([text], index) => h("th", { scope: "col", class: side(index) }, text)),
        ),
      ),
      h("tbody", {}, rows),
    ),
  );
  (root.querySelector("tr[aria-current] a.row-link") ?? root.querySelector("a.row-link")).setAttribute("tabindex", "0");
}

const shownCell = (value) => (typeof value === "number" ? String(value || "") : value);

/** The largest figure of a kernel's launches. */
function mostOf(kernel, key) {
  return Math.max(0, ...kernel.launches.map((launch) => launch[key] ?? 0));
}

/** The panel of a kernel. */
function kernelDetails(model, name) {
  const kernel = model.kernelNamed.get(name);
  if (!kernel) return [heading("not found", name), h("p", {}, `There is no kernel called ${name}.`)];
  const launches = kernel.launches.map((launch) => [
    h("code", {}, launch.function),
    String(launch.registers ?? ""),
    bytesText(launch.shared_bytes ?? 0),
    String(launch.num_warps ?? ""),
    String(launch.num_stages ?? ""),
  ]);
  return [
    heading("kernel", kernel.name),
    h("p", {}, h("code", { class: "wrap" }, kernel.spec)),
    part("Launches", launches.length > 0 && table(["function", "registers", "shared", "warps", "stages"], launches, [1, 2, 3, 4])),
    part("Serves", model.last && names(kernel.nodes, model.last)),
    kernel.source
      ? part("Source", h("pre", { class: "source", tabindex: "0" }, sourceSpans(kernel.source)))
      : h("p", { class: "caption" }, "It has no source: the reference or the engine's own operator."),
  ];
}
