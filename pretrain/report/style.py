"""The page's style sheet: one column on a phone, a grid on a screen, light or dark as the reader's system is."""

SHEET = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2130;--soft:#566074;--line:#dde2ea;--accent:#2459c9;
--heat:#6f9bf0;--good:#17784a;--bad:#b3261e;--warn:#96590a;--band:#96590a22;
--c0:#2459c9;--c1:#c2540a;--c2:#0b7d6c;--c3:#8a3ffc;--c4:#b81f5c;--c5:#66720a}
@media (prefers-color-scheme:dark){:root{--bg:#11141a;--card:#1a1f28;--ink:#e8ebf1;--soft:#a3adbf;--line:#303846;
--accent:#8ab4ff;--heat:#2c5bbd;--good:#5fd39a;--bad:#ff8f87;--warn:#f0b35a;--band:#f0b35a2b;
--c0:#8ab4ff;--c1:#ffa45c;--c2:#4fd6bf;--c3:#c4a0ff;--c4:#ff8bb8;--c5:#cdd95c}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:4rem;-webkit-text-size-adjust:100%}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans","Liberation Sans",sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:82rem;margin:0 auto;padding:0 clamp(.9rem,3vw,2rem)}
header{padding-top:2rem}
h1{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 .3rem;letter-spacing:-.02em}
h2{font-size:1.35rem;margin:3rem 0 .35rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:0;display:flex;justify-content:space-between;gap:1rem;align-items:baseline}
p{margin:.3rem 0 .8rem;max-width:75ch}
.soft,figcaption p,h2+p,footer{color:var(--soft)}
a{color:var(--accent)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:6px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.6rem 1rem;
z-index:9}
nav{position:sticky;top:0;z-index:5;background:var(--bg);border-bottom:1px solid var(--line);margin-top:1.4rem}
nav ul{list-style:none;display:flex;gap:.3rem 1.3rem;margin:0 auto;max-width:82rem;overflow-x:auto;
padding:.65rem clamp(.9rem,3vw,2rem)}
nav a{white-space:nowrap;text-decoration:none;font-weight:550;display:inline-block;padding:.15rem 0}
nav a:hover{text-decoration:underline}
.grid-cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem}
.grid-cards>figure{display:flex;flex-direction:column}.grid-cards>figure>svg{margin-top:auto}
.wide-cards{align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%,31rem),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1rem 1.1rem .8rem;margin:0;
min-width:0}
figcaption p{font-size:.86rem;margin:.1rem 0 .4rem}
.now{font-variant-numeric:tabular-nums;font-size:1.1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,8.4rem),1fr));gap:.7rem;margin:1.3rem 0 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:.65rem .8rem}
.tiles dt{color:var(--soft);font-size:.82rem}
.tiles dd{margin:0;font-size:1.32rem;font-weight:620;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
svg.chart,svg.map{display:block;width:100%;height:auto;font-size:11px;overflow:visible}
svg text{fill:var(--soft);font-variant-numeric:tabular-nums}
.tick{dominant-baseline:middle}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1;opacity:.6}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 3}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
.s5{stroke:var(--c5)}
.dot{fill:var(--card);stroke-width:2}
.legend{list-style:none;margin:0 0 .4rem;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.84rem}
.key{width:20px;height:10px;vertical-align:middle}
.mark path{stroke:var(--warn);stroke-width:1.3;stroke-dasharray:4 3}.mark rect{fill:var(--band)}
.mark.skipped path{stroke:var(--bad);stroke-dasharray:1 3}.mark text{fill:var(--warn);font-size:9px}
.mark.skipped text{fill:var(--bad)}
.signs{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;padding:0;margin:.2rem 0 1rem;font-size:.9rem}
.hit{fill:transparent}.stop>:not(.hit){display:none;pointer-events:none}.stop:hover>:not(.hit){display:inline}
.rule{stroke:var(--soft);stroke-width:1}.stop rect:not(.hit){fill:var(--card);stroke:var(--line)}
.stop text{fill:var(--ink);font-size:11px}
details{font-size:.88rem;margin-top:.35rem}summary{cursor:pointer;color:var(--soft);padding:.2rem 0;width:fit-content}
.scroll{overflow-x:auto;margin:.3rem 0;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:min(100%,22rem)}
caption{text-align:left;color:var(--soft);font-size:.86rem;padding-bottom:.3rem}
th,td{text-align:left;padding:.34rem .9rem .34rem 0;border-bottom:1px solid var(--line);vertical-align:top;
font-weight:400}
thead th{color:var(--soft);font-size:.84rem;white-space:nowrap}tbody th{font-weight:550}td,th{overflow-wrap:normal}
.events tbody th{white-space:nowrap}.events td:last-child{min-width:14rem}
.sub{margin:2rem 0 .5rem;font-size:1.08rem}.run{margin:1.6rem 0 .5rem;font-size:1.08rem;
border-bottom:2px solid var(--line);padding-bottom:.3rem}
.beside{display:grid;gap:1rem;align-items:start}
@media (min-width:64rem){.beside{grid-template-columns:minmax(0,1.9fr) minmax(17rem,1fr)}}
img{border-radius:6px;display:block;background:var(--line);object-fit:cover;max-width:none}
.matrix{border-collapse:separate;border-spacing:2px;min-width:0}
.matrix th,.matrix td{border:0;padding:0;text-align:center;vertical-align:middle}
.matrix td{min-width:2.35rem;height:2.35rem;border-radius:5px;font-size:.74rem;color:var(--ink);
background:color-mix(in oklab,var(--heat) calc(var(--v)*100%),var(--card))}
.matrix td.own{font-weight:700;outline:2px solid var(--ink);outline-offset:-2px}
.matrix tbody th{text-align:right;padding-right:.5rem;font-weight:400;font-size:.82rem}
.matrix tbody th>span{display:flex;gap:.55rem;align-items:center;justify-content:flex-end}
.matrix tbody th em{font-style:normal;width:15rem;line-height:1.2}
.pairs{list-style:none;margin:0;padding:0;display:grid;gap:.9rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.pairs li{display:flex;gap:.85rem;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:.8rem}
.pairs p{margin:0 0 .25rem;font-size:.92rem;line-height:1.35}
.pairs small{color:var(--soft);display:block;line-height:1.35}
.answers{list-style:none;margin:.2rem 0 0;padding:0;font-size:.86rem;line-height:1.35;width:100%}
.answers li{display:flex;gap:.5rem;padding:.12rem 0;background:none;border:0;border-radius:0}
.answers b{font-weight:550;font-variant-numeric:tabular-nums;margin-left:auto;white-space:nowrap;overflow-wrap:normal}
.strip{display:flex;flex-wrap:wrap;gap:.5rem;margin:.3rem 0 0}
.strip figure{margin:0;font-size:.76rem;text-align:center;color:var(--soft);line-height:1.3}
.strip figure.own img{outline:3px solid var(--good);outline-offset:1px}.strip .own figcaption{color:var(--good)}
.map .tie{stroke:var(--soft);opacity:.25}.map .image{fill:var(--c0);opacity:.85}.map .caption{fill:var(--c1);
opacity:.85}
.map g:hover>*{stroke:var(--ink);stroke-width:1.5}.map text{fill:var(--ink);font-size:9.5px;paint-order:stroke;
stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.overview{width:100%;max-width:24rem;height:auto;image-rendering:pixelated;border-radius:6px}
.bars{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr max-content;gap:.25rem .7rem;font-size:.86rem;
margin:.4rem 0}
.bars i{display:block;background:var(--line);border-radius:4px;height:.7rem;align-self:center;overflow:hidden}
.bars i::before{content:"";display:block;height:100%;width:calc(var(--v)*100%);background:var(--accent)}
.note{border-left:4px solid var(--warn);background:var(--card);padding:.7rem 1rem;border-radius:0 10px 10px 0;
max-width:none}
pre{white-space:pre-wrap;font-size:.84rem;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:1rem}
footer{padding-top:2.5rem;padding-bottom:3rem;font-size:.86rem}
@media print{nav,.skip{display:none}body{background:#fff}.card,.pairs li{break-inside:avoid}}
@media (max-width:40rem){.matrix tbody th em{width:8.5rem}h2{margin-top:2.2rem}.tiles{grid-template-columns:1fr 1fr}
.tiles dd{font-size:1.12rem}.card{padding:.85rem .8rem .7rem}}
"""
