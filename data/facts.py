"""The facts of the task quiz, as text: one relation a constant, its facts as "subject = answer"."""

# Countries of one undisputed capital, whose name is not a part of it
CAPITALS = """
Afghanistan = Kabul; Albania = Tirana; Algeria = Algiers; Andorra = Andorra la Vella;
Angola = Luanda; Argentina = Buenos Aires; Armenia = Yerevan; Australia = Canberra;
Austria = Vienna; Azerbaijan = Baku; the Bahamas = Nassau; Bahrain = Manama; Bangladesh = Dhaka;
Barbados = Bridgetown; Belarus = Minsk; Belgium = Brussels; Belize = Belmopan; Benin = Porto-Novo;
Bhutan = Thimphu; Bosnia and Herzegovina = Sarajevo; Botswana = Gaborone; Brazil = Brasília;
Brunei = Bandar Seri Begawan; Bulgaria = Sofia; Burkina Faso = Ouagadougou; Cambodia = Phnom Penh;
Cameroon = Yaoundé; Canada = Ottawa; Cape Verde = Praia; the Central African Republic = Bangui;
Chad = N'Djamena; Chile = Santiago; China = Beijing; Colombia = Bogotá; Comoros = Moroni;
Costa Rica = San José; Croatia = Zagreb; Cuba = Havana; Cyprus = Nicosia;
the Czech Republic = Prague; the Democratic Republic of the Congo = Kinshasa; Denmark = Copenhagen;
the Dominican Republic = Santo Domingo; Ecuador = Quito; Egypt = Cairo; El Salvador = San Salvador;
Eritrea = Asmara; Estonia = Tallinn; Ethiopia = Addis Ababa; Fiji = Suva; Finland = Helsinki;
France = Paris; Gabon = Libreville; the Gambia = Banjul; Georgia = Tbilisi; Germany = Berlin;
Ghana = Accra; Greece = Athens; Guinea = Conakry; Guyana = Georgetown; Haiti = Port-au-Prince;
Honduras = Tegucigalpa; Hungary = Budapest; Iceland = Reykjavik; India = New Delhi;
Indonesia = Jakarta; Iran = Tehran; Iraq = Baghdad; Ireland = Dublin; Italy = Rome;
Jamaica = Kingston; Japan = Tokyo; Jordan = Amman; Kazakhstan = Astana; Kenya = Nairobi;
Kosovo = Pristina; Kyrgyzstan = Bishkek; Laos = Vientiane; Latvia = Riga; Lebanon = Beirut;
Lesotho = Maseru; Liberia = Monrovia; Libya = Tripoli; Liechtenstein = Vaduz; Lithuania = Vilnius;
Madagascar = Antananarivo; Malawi = Lilongwe; Malaysia = Kuala Lumpur; the Maldives = Malé;
Mali = Bamako; Malta = Valletta; Mauritania = Nouakchott; Mauritius = Port Louis;
Mongolia = Ulaanbaatar; Montenegro = Podgorica; Morocco = Rabat; Mozambique = Maputo;
Myanmar = Naypyidaw; Namibia = Windhoek; Nepal = Kathmandu; the Netherlands = Amsterdam;
New Zealand = Wellington; Nicaragua = Managua; Niger = Niamey; Nigeria = Abuja;
North Korea = Pyongyang; North Macedonia = Skopje; Norway = Oslo; Oman = Muscat;
Pakistan = Islamabad; Papua New Guinea = Port Moresby; Paraguay = Asunción; Peru = Lima;
the Philippines = Manila; Poland = Warsaw; Portugal = Lisbon; Qatar = Doha; Romania = Bucharest;
Russia = Moscow; Rwanda = Kigali; Samoa = Apia; Saudi Arabia = Riyadh; Scotland = Edinburgh;
Senegal = Dakar; Serbia = Belgrade; Sierra Leone = Freetown; Slovakia = Bratislava;
Slovenia = Ljubljana; Somalia = Mogadishu; South Korea = Seoul; Spain = Madrid; Sudan = Khartoum;
Sweden = Stockholm; Switzerland = Bern; Syria = Damascus; Taiwan = Taipei; Tanzania = Dodoma;
Thailand = Bangkok; Togo = Lomé; Tonga = Nuku'alofa; Trinidad and Tobago = Port of Spain;
Tunisia = Tunis; Turkey = Ankara; Turkmenistan = Ashgabat; Uganda = Kampala; Ukraine = Kyiv;
the United Arab Emirates = Abu Dhabi; the United Kingdom = London;
the United States = Washington, D.C.; Uruguay = Montevideo; Uzbekistan = Tashkent;
Vanuatu = Port Vila; Venezuela = Caracas; Vietnam = Hanoi; Wales = Cardiff; Yemen = Sanaa;
Zambia = Lusaka; Zimbabwe = Harare"""

OPPOSITES = """
hot = cold; big = small; tall = short; fast = slow; happy = sad; light = dark; up = down; in = out;
open = closed; early = late; young = old; rich = poor; strong = weak; hard = soft; wet = dry;
clean = dirty; full = empty; loud = quiet; day = night; good = bad; right = wrong; true = false;
high = low; near = far; thick = thin; wide = narrow; deep = shallow; heavy = light; left = right;
love = hate; war = peace; life = death; win = lose; buy = sell; give = take; push = pull;
begin = end; first = last; front = back; top = bottom; inside = outside; over = under;
before = after; always = never; all = none; yes = no; black = white; east = west; north = south;
summer = winter; morning = evening; friend = enemy; brave = cowardly; cheap = expensive;
easy = difficult; sharp = blunt; smooth = rough; sweet = bitter; straight = crooked;
awake = asleep; alive = dead; safe = dangerous; same = different; more = less; add = subtract;
accept = reject; success = failure; victory = defeat; arrive = depart; increase = decrease;
remember = forget; laugh = cry; question = answer; ancient = modern; public = private;
positive = negative; maximum = minimum; possible = impossible; visible = invisible;
legal = illegal"""

# The animals whose young a model of 135M parameters knows
YOUNG = """
cat = kitten; deer = fawn; duck = duckling; eagle = eaglet; frog = tadpole; goose = gosling;
hare = leveret; horse = foal; kangaroo = joey; owl = owlet; pig = piglet; swan = cygnet"""

LANGUAGES = """
France = French; Germany = German; Italy = Italian; Spain = Spanish; Portugal = Portuguese;
Brazil = Portuguese; Mexico = Spanish; Argentina = Spanish; Russia = Russian; China = Chinese;
Japan = Japanese; South Korea = Korean; Vietnam = Vietnamese; Thailand = Thai; Turkey = Turkish;
Greece = Greek; Poland = Polish; Hungary = Hungarian;
Romania = Romanian; Bulgaria = Bulgarian; Serbia = Serbian; Croatia = Croatian;
Slovenia = Slovenian; Slovakia = Slovak; Ukraine = Ukrainian; Lithuania = Lithuanian;
Latvia = Latvian; Estonia = Estonian; Finland = Finnish; Sweden = Swedish; Norway = Norwegian;
Denmark = Danish; Iceland = Icelandic; the Netherlands = Dutch; Egypt = Arabic; Iraq = Arabic;
Saudi Arabia = Arabic; Iran = Persian; Bangladesh = Bengali; Nepal = Nepali; Indonesia = Indonesian;
Malaysia = Malay; Mongolia = Mongolian; Albania = Albanian; Armenia = Armenian;
Georgia = Georgian; Ethiopia = Amharic; Australia = English; Austria = German; Cuba = Spanish;
Angola = Portuguese"""
