// Without this script the page is whole: it only makes hover text prompt, reads heat maps, and adds copy buttons.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const show = (words, event) => {
    tip.textContent = words;
    tip.classList.add("on");
    const room = document.documentElement.clientWidth, box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, room - box.width - 8)) + "px";
    const below = event.clientY + 16;
    tip.style.top = (below + box.height > innerHeight ? Math.max(4, event.clientY - box.height - 12) : below) + "px";
  };
  const hide = () => tip.classList.remove("on");

  const pixels = new WeakMap();
  const palette = JSON.parse(document.getElementById("palette")?.textContent ?? '""');
  const levels = new Map();
  for (let at = 0; at < 250; at++) levels.set(palette.slice(at * 6, at * 6 + 6), at);
  const load = (svg) => {
    if (pixels.has(svg)) return;
    pixels.set(svg, null);
    const picture = new Image();
    picture.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = picture.width; canvas.height = picture.height;
      const context = canvas.getContext("2d");
      context.drawImage(picture, 0, 0);
      pixels.set(svg, context.getImageData(0, 0, picture.width, picture.height));
    };
    picture.src = svg.querySelector(".cells").getAttribute("href");
  };
  const cell = (svg, event) => {
    const box = svg.querySelector(".cells").getBoundingClientRect(), data = pixels.get(svg);
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    if (!data || x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    const column = Math.floor(x * data.width), row = Math.floor(y * data.height), at = 4 * (row * data.width + column);
    const seams = JSON.parse(svg.dataset.seams), token = Math.floor(x * svg.dataset.tokens);
    const code = [0, 1, 2].map((part) => data.data[at + part].toString(16).padStart(2, "0")).join("");
    const low = +svg.dataset.low, high = +svg.dataset.high, level = levels.get(code);
    const value = data.data[at + 3] === 0 ? "not measured" : level === undefined ? "∞"
      : "≈ " + (10 ** (low + (high - low) * level / 249)).toExponential(1);
    return `${seams[row]}\ntoken ${token}: ${value}`;
  };

  document.addEventListener("pointermove", (event) => {
    const column = event.target.closest?.("g.col");
    if (column) {
      const title = column.querySelector("title");
      if (title) { column.dataset.tip = title.textContent; title.remove(); }
      return show(column.dataset.tip, event);
    }
    const map = event.target.closest?.("svg.heat");
    if (map) {
      load(map);
      const words = cell(map, event);
      if (words) return show(words, event);
    }
    hide();
  });
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // Where a picture is wider than the screen, begin at the seam that broke.
  for (const pole of document.querySelectorAll(".chart .broken")) {
    const chart = pole.closest(".chart");
    chart.scrollLeft += pole.getBoundingClientRect().left - chart.getBoundingClientRect().left - chart.clientWidth / 2;
  }

  for (const block of document.querySelectorAll("pre.copy")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      const words = block.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(words);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(block.querySelector("code"));
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
})();
